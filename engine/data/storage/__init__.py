"""Token files in Megatron's indexed format, with checksums."""
