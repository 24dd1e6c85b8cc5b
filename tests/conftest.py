import vlahub
from tests.worlds import POINT

vlahub.register_env(POINT)
