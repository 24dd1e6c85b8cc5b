import os

# Before anything imports torch. Two test processes share the cores, and threads that wait for each other's turn take longer than one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import vlahub
from tests.worlds import POINT, POINT_TOLD

vlahub.register_env(POINT)
vlahub.register_env(POINT_TOLD)
for head in ("gaussian", "categorical", "flow"):
    vlahub.register_family(
        vlahub.FamilyCard(f"test-mlp-{head}", f"tests.mlp:{head.title()}Mlp", "an MLP on the state, for tests", recognises=lambda folder: False)
    )
