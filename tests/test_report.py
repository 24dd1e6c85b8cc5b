import html.parser
import re

import numpy as np
import pytest

from vlahub import report, video
from vlahub.evaluation import Outcome, Results


def results(**changes):
    episodes = [
        Outcome(0, 0, 0, 11, "push <the> bell", True, 12, 1.0, simulate_seconds=2.0, infer_seconds=1.0),
        Outcome(1, 0, 1, 12, "press the bell & wait", False, 20, 0.0),
        Outcome(2, 1, 0, 13, "open it", True, 6, 1.0),
        Outcome(3, 1, 1, 14, "open it", False, 0, 0.0, attempts=3, aborted="the worker died"),
    ]
    settings = {"env": "test/<Point>", "policy": "expert", "seed": 0, "env_options": {"size": 24}, "assets": "stand-in"}
    return Results(**{"episodes": episodes, "settings": settings, "warnings": ["1 <episode> was lost"], "command": "vlahub eval --env x", **changes})


def clip(episode, success, size=1000):
    frames = [np.full((24, 32, 3), 40 * i, np.uint8) for i in range(4)]
    return report.Clip(episode, success, "click", f"videos/episode_{episode:05d}.mp4", video.encode(frames, 10) + bytes(size), frames[-1])


class Checker(html.parser.HTMLParser):
    """Balanced tags, and every address that the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "poster")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_needs_no_other_file():
    page = report.render(results().to_dict(), [clip(0, True), clip(1, False)])
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "{{" not in page
    assert len(checker.loads) == 4 and all(address.startswith("data:") for address in checker.loads)
    assert not re.findall(r"(?:https?:)?//\S+\.(?:js|css)", page) and "<link" not in page and "<script" not in page
    assert "test/&lt;Point&gt;" in page and "<Point>" not in page and "push &lt;the&gt; bell" in page


def test_the_page_says_what_was_measured():
    page = report.render(results().to_dict(), [clip(0, True)])
    for words in (
        "66.7 %",
        "2 of 3 episodes solved",
        "20.8 to 93.9 %",
        "1 &lt;episode&gt; was lost",
        "vlahub eval --env x",
        "the worker died",
        "stand-in",
        "12.7",
        "vlahub</th>",
    ):
        assert words in page, words
    assert page.count("<video") == 1 and "episode 0" in page and "unfinished" not in page
    assert "unfinished" in report.render(results(finished=False).to_dict())


def test_large_videos_are_linked_and_shown_by_their_last_picture():
    page = report.render(results().to_dict(), [clip(0, True, size=report.LARGEST_INLINE_VIDEO), clip(1, False)])
    assert page.count("<video") == 1 and 'href="videos/episode_00000.mp4"><img' in page
    assert len(page) < 100_000


def test_no_counted_episode_gives_no_rate():
    page = report.render(results(episodes=[results().episodes[3]]).to_dict())
    assert "no rate" in page and "0 of 0 episodes" in page


@pytest.mark.parametrize(("rate", "words"), [(None, "no rate"), (0, "0.0 %"), (1, "100.0 %"), (2 / 3, "66.7 %")])
def test_percent(rate, words):
    assert report.percent(rate) == words
