"""Export to Hugging Face transformers: one table per class, an exact matcher, and a proof by logits."""
