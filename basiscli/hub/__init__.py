"""The Hugging Face Hub: models down, outputs up."""
