"""Policy families, one readable file each; `parts/` holds what they truly share."""

# registers every family with its known checkpoints
from vlahub_policies import openvla_oft_cards, pi0_cards  # noqa: F401
