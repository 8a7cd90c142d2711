"""The Hugging Face Hub: downloads, headers without weights, uploads, errors."""
