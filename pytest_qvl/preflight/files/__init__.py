"""Reading what strangers have sent: bounded, inside one folder, without running anything."""
