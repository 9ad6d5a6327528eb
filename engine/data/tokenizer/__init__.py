"""Tokenizers: trained here or given, kept as a Hugging Face folder, and what their ids are for."""
