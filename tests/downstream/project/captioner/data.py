"""Rows as they are stored, and the collator that makes batches of them."""


def row(question, answer, images):
    """One conversation."""
    asked = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": list(images),
    }


class Collator:
    """Rows to a batch whose labels are the answers with their end token."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        """Tokens padded on the right; pixels of all images, one after the other."""
        batch = self.encode(rows, [self.processor.apply_chat_template(row["messages"]) for row in rows])
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for line, row in zip(labels, rows, strict=True):
            prompt = self.processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)
            line[: self.encode([row], [prompt])["input_ids"].shape[1]] = -100
        batch["labels"] = labels
        return batch

    def encode(self, rows, texts):
        """What the model's processor makes of texts and images."""
        images = [image for row in rows for image in row["images"]]
        return self.processor(
            text=texts, images=images or None, padding=True, padding_side="right", return_tensors="pt"
        )
