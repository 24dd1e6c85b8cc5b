"""Policy families, one readable file each; `parts/` holds what they truly share."""

# each registers its families with their known checkpoints
from vlahub_policies import bundled_cards, openvla_oft_cards, pi0_cards, qwen_cards  # noqa: F401
