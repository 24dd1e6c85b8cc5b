"""What policy families share: flow matching, value heads, image transforms, normalisation, LoRA."""
