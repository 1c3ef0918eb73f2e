"""What to say for each task, in natural words, verb first.

Each task has one tuple of phrases for training and one for evaluation on unseen wording. A scene task uses the words
of the plain task that it mirrors, so a policy meets one language.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from vla_dist.core.errors import ConfigError, NotFound

Split = Literal["training", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

_TRAINING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "reach": (
            "reach the target", "move to the target", "go to the goal point", "move the hand to the target",
            "reach for the marked spot", "bring the gripper to the goal",
        ),
        "push": (
            "push the puck to the target", "push the puck to the goal", "slide the puck to the target",
            "shove the puck onto the mark", "move the puck along the table to the goal",
            "push the red puck to its spot",
        ),
        "pick-place": (
            "pick up the puck and place it at the target", "lift the puck to the goal",
            "grasp the puck and carry it to the target", "take the puck and bring it to the goal",
            "pick the puck up and hold it at the mark", "grab the puck and move it to the target",
        ),
        "door-open": (
            "open the door", "pull the door open", "open the safe door", "swing the door open",
            "pull on the door handle", "get the door open", "open the door wide", "open up the door",
        ),
        "door-close": (
            "close the door", "shut the door", "push the door shut", "swing the door closed",
            "push the door closed", "close up the safe door", "get the door shut", "make the door shut",
        ),
        "drawer-open": (
            "open the drawer", "pull the drawer open", "slide the drawer open", "pull out the drawer",
            "open up the drawer", "pull the drawer handle toward you", "get the drawer open", "draw the drawer out",
            "tug the drawer open", "make the drawer open",
        ),
        "drawer-close": (
            "close the drawer", "push the drawer shut", "shut the drawer", "slide the drawer closed",
            "push in the drawer", "push the drawer handle away from you", "get the drawer closed",
            "press the drawer shut", "close up the drawer", "make the drawer shut",
        ),
        "button-press": (
            "push the button on the wall of the box", "press the front button", "push in the front button",
            "hit the front button", "press the button on the side", "push the side button in",
        ),
        "button-press-topdown": (
            "press the button", "push the button", "push the button down", "press down on the button",
            "hit the button", "press the red button", "tap the button", "push down the red button",
            "depress the button", "click the button",
        ),
        "window-open": (
            "open the window", "slide the window open", "push the window open", "open up the window",
            "get the window open", "slide the window to the right", "move the window pane open",
            "make the window open",
        ),
        "window-close": (
            "close the window", "slide the window closed", "shut the window", "push the window shut",
            "get the window closed", "slide the window to the left", "move the window pane shut",
            "make the window shut",
        ),
        "peg-insert-side": (
            "insert the peg", "put the peg in the hole", "insert the peg into the hole",
            "slide the peg into the side hole", "plug the peg into the box", "stick the peg in the hole",
        ),
        "faucet-open": (
            "open the faucet", "turn on the faucet", "turn the tap on", "open the tap", "rotate the faucet on",
            "let the water run",
        ),
        "faucet-close": (
            "close the faucet", "turn off the faucet", "turn the tap off", "close the tap", "rotate the faucet off",
            "stop the water",
        ),
        "handle-press": (
            "press the handle", "push the handle down", "press down the lever handle", "push down on the handle",
            "lower the handle", "force the handle down",
        ),
        "plate-slide": (
            "slide the plate into the cabinet", "push the plate into the goal", "slide the plate in",
            "push the plate forward", "move the plate into the net", "shoot the plate into the goal",
        ),
        "coffee-button": (
            "press the coffee button", "start the coffee machine", "push the button of the coffee machine",
            "turn on the coffee maker", "brew a coffee", "switch the coffee machine on",
        ),
    }
)  # fmt: skip

_HELD_OUT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "reach": ("put the hand at the target", "touch the goal point"),
        "push": ("nudge the puck to the goal", "get the puck to the target by pushing"),
        "pick-place": ("fetch the puck and put it at the goal", "raise the puck to the target"),
        "door-open": ("pull open the door", "let the door swing open", "draw the door open"),
        "door-close": ("push the door to", "slam the door", "bring the door to a close"),
        "drawer-open": ("pull open the drawer", "slide out the drawer", "haul the drawer open", "extend the drawer"),
        "drawer-close": (
            "push the drawer closed", "slide in the drawer", "shove the drawer shut", "retract the drawer",
        ),
        "button-press": ("tap the front button", "push the button from the front"),
        "button-press-topdown": (
            "push down on the button", "give the button a press", "strike the button", "activate the button",
        ),
        "window-open": ("shove the window open", "push open the window", "draw the window open"),
        "window-close": ("shove the window shut", "push the window closed", "draw the window closed"),
        "peg-insert-side": ("push the peg into its hole", "fit the peg into the box"),
        "faucet-open": ("twist the faucet on", "switch the tap on"),
        "faucet-close": ("twist the faucet off", "switch the tap off"),
        "handle-press": ("pull the handle downward", "bear down on the handle"),
        "plate-slide": ("shove the plate into the cabinet", "glide the plate into the goal"),
        "coffee-button": ("hit the coffee button", "make the machine brew coffee"),
    }
)  # fmt: skip

_SAME_WORDS = MappingProxyType(
    {
        "scene/drawer-open": "drawer-open",
        "scene/drawer-close": "drawer-close",
        "scene/button-press": "button-press-topdown",
    }
)

_JOINT = "+"
_SEQUENCES = tuple(f"{first}{_JOINT}{second}" for first in _SAME_WORDS for second in _SAME_WORDS if first != second)

WORDED_TASKS: tuple[str, ...] = (*_TRAINING, *_SAME_WORDS, *_SEQUENCES)
"""Every task that has words."""


def phrases(task: str, split: Split) -> tuple[str, ...]:
    """All phrases of a task in one split.

    Raises:
        NotFound: a task without words.
        ConfigError: no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"instruction split {split!r} must be one of {', '.join(SPLITS)}")
    if task in _SEQUENCES:
        return _joined(task, split)
    table = _TRAINING if split == "training" else _HELD_OUT
    key = _SAME_WORDS.get(task, task)
    if key not in table:
        raise NotFound(f"no instructions for task {task!r}; tasks with words are {', '.join(WORDED_TASKS)}")
    return table[key]


def _joined(task: str, split: Split) -> tuple[str, ...]:
    """Of two tasks in a row: each wording of the first with one of the second, not of the same place in its list."""
    first, second = (phrases(one, split) for one in task.split(_JOINT))
    return tuple(f"{words}, then {second[(place + 1) % len(second)]}" for place, words in enumerate(first))


def instruction_for(task: str, seed: int, split: Split = "training") -> str:
    """The phrase that this seed chooses, independent of the layout that the seed chooses.

    Raises:
        NotFound: a task without words.
    """
    choices = phrases(task, split)
    digest = hashlib.sha256(f"instruction/{task}/{seed}".encode()).digest()
    return choices[int.from_bytes(digest[:4], "big") % len(choices)]
