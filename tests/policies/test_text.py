import copy

import numpy as np

from vlahub_policies.parts import text


def test_prompts():
    tokenizer = text.bundled()
    ids = tokenizer.prompt("  pick_up the\nbowl ")
    assert ids[0] == 2 and tokenizer.decode(ids) == "pick up the bowl\n"
    assert tokenizer.decode(tokenizer.prompt_with_state("lift", np.array([-1.5, -1.0, 0.0, 2.0]))) == "Task: lift, State: -1 0 128 255;\nAction: "
    assert tokenizer.decode(tokenizer.prompt("打开 the ünknown drawer")) == "打开 the ünknown drawer\n"


def test_padding_and_truncation():
    tokens, mask = text.pad([[2, 5, 6], [2, 5, 6, 7, 8]], 4)
    assert tokens.tolist() == [[2, 5, 6, 0], [2, 5, 6, 7]] and mask.sum(1).tolist() == [3, 4]


def test_a_tokenizer_travels_with_its_policy():
    tokenizer = text.bundled()
    assert copy.deepcopy(tokenizer).prompt("open the drawer") == tokenizer.prompt("open the drawer")


def test_training_one():
    made = text.Tokenizer(text.train(["press the red button", "press the blue button"] * 50, size=300))
    assert len(made) <= 300 and made.decode(made.prompt("press the green button")) == "press the green button\n"
