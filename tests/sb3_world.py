"""The test world with pictures large enough for stable-baselines3's network, registered by importing this module."""

import dataclasses

import vlahub
from tests.worlds import POINT

vlahub.register_env(dataclasses.replace(POINT, id="test/BigPoint", kwargs={"size": 40, "wrists": 1}))
