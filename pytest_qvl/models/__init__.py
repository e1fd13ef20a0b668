"""Everything that knows what is inside Transformers, PEFT and bitsandbytes objects."""
