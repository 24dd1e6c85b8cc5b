"""Policy families, one readable file each; `parts/` holds what they truly share."""

from vlahub_policies import pi0_cards, qwen_cards  # noqa: F401  register the families with their known checkpoints
