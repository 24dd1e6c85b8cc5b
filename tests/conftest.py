import vlahub
from tests.worlds import POINT, POINT_TOLD

vlahub.register_env(POINT)
vlahub.register_env(POINT_TOLD)
for head in ("gaussian", "categorical", "flow"):
    vlahub.register_family(
        vlahub.FamilyCard(f"test-mlp-{head}", f"tests.mlp:{head.title()}Mlp", "an MLP on the state, for tests", recognises=lambda folder: False)
    )
