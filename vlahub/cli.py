"""`vlahub list | doctor | assets | eval | record | plot`: the command line. `python -m vlahub` is the same.

A subcommand is a function with a docstring; its signature is the command's help. Errors of the user's making are one message and exit status 2;
`--debug` anywhere on the line shows the traceback instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json as json_module
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium
import tyro

from vlahub import catalog
from vlahub.catalog import key_values

# What a wrong argument, a missing package or file, or a world that cannot run raises. Anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError, gymnasium.error.Error)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    # `--policy module:function` names a module beside the user, which an installed script does not look for
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    commands = {"list": list_cards, "doctor": doctor, "assets": assets, "eval": evaluate, "record": record, "plot": plot}
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="vlahub",
            description="Robot environments and Vision-Language-Action policies. --debug shows the traceback of an error.",
            args=argv,
        )
    except KeyboardInterrupt:
        print("vlahub: interrupted", file=sys.stderr)
        return 130  # what a shell gives for Ctrl-C
    except EXPECTED as error:
        if debug:
            raise
        print(f"vlahub: {error or type(error).__name__}", file=sys.stderr)
        return 2
    return int(status or 0)


# ------------------------------------------------------------------------------------------------ list


def list_cards(id: tyro.conf.Positional[str] = "", json: tyro.conf.FlagCreatePairsOff[bool] = False) -> int:
    """Show the environments and policies, or everything about one.

    Args:
        id: an environment, policy or family; its whole card is shown.
        json: for machines.
    """
    kinds = {"environments": catalog.ENVS, "policies": catalog.POLICIES, "families": catalog.FAMILIES, "weights": catalog.WEIGHTS}
    if id:
        found = [(kind, cards[id]) for kind, cards in kinds.items() if id in cards]
        if not found:
            raise catalog.UnknownId(f"nothing is called {id!r}; {catalog.suggest(id, [name for cards in kinds.values() for name in cards])}")
        _show_card(found[0][1], json)
    elif json:
        print(json_module.dumps({kind: [_record(card) for card in cards.values()] for kind, cards in kinds.items()}, indent=2))
    else:
        _show_all()
    return 0


def _record(card: Any) -> dict[str, Any]:
    """A card as plain data, without its functions, and with whether what it needs is installed."""
    record = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    record = {name: dict(value) if isinstance(value, Mapping) else value for name, value in record.items() if not callable(value)}
    return {**record, "installed": not _missing(card)}


def _missing(card: Any) -> list[str]:
    if isinstance(card, catalog.PolicyCard):
        card = catalog.FAMILIES.get(card.family)
    return [package for package in getattr(card, "needs", ()) if importlib.util.find_spec(package) is None]


def _fix(card: Any) -> str:
    if not _missing(card):
        return ""
    extra = card.extra if hasattr(card, "extra") else catalog.family_card(card.family).extra
    return f"pip install 'vlahub[{extra}]'" if extra else f"pip install {' '.join(_missing(card))}"


def _show_card(card: Any, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    record = _record(card)
    if as_json:
        print(json_module.dumps(record, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in record.items():
        if name == "installed":
            value = "yes" if value else f"no: {_fix(card)}"
        elif isinstance(value, dict):
            value = ", ".join(f"{key}={entry!r}" for key, entry in value.items())
        elif isinstance(value, tuple):
            value = ", ".join(map(str, value))
        if value:
            table.add_row(f"[bold]{name}[/]", _plain(value))
    Console().print(table)


def _show_all() -> None:
    """An id per line, uncut so that it can be copied, and what it is below it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()

    def show(title: str, cards: Mapping[str, Any]) -> None:
        console.print(Text(title, style="bold"))
        for card in cards.values():
            console.print(Text(f"  {card.id}", style="cyan"), soft_wrap=True)
            console.print(Padding(_plain(_with_fix(card) + _trained_for(card)), (0, 0, 0, 6)))
        if not cards:
            console.print("  none registered")

    show("Environments", catalog.ENVS)
    for family in catalog.FAMILIES.values():
        mine = {name: card for name, card in catalog.POLICIES.items() if card.family == family.name}
        show(f"Policies of the family {family.name}: {family.summary}", mine)
    if catalog.WEIGHTS:
        show("World models", catalog.WEIGHTS)
    console.print("`vlahub list ID` shows one card whole; any folder or hub repository of a known family can be a policy.", soft_wrap=True)


def _trained_for(card: Any) -> str:
    envs = getattr(card, "envs", ())
    absent = "" if all(env in catalog.ENVS for env in envs) else ", not in this version"
    return f" [for {', '.join(envs)}{absent}]" if envs else ""


def _with_fix(card: Any) -> str:
    asks = getattr(card, "asks", "")
    return card.summary + (f" (not installed: {_fix(card)})" if _missing(card) else "") + (f" (needs {asks})" if asks else "")


def _plain(text: Any) -> Any:
    """Text that rich must not read as markup: 'vlahub[train]' is no style."""
    from rich.text import Text

    return Text(str(text))


# ------------------------------------------------------------------------------------------------ doctor


def doctor() -> int:
    """Check everything that environments and policies need on this machine, each with its fix."""
    from vlahub import doctor as checks

    return checks.main()


# ------------------------------------------------------------------------------------------------ assets


def assets(name: tyro.conf.Positional[str] = "", download: tyro.conf.FlagCreatePairsOff[bool] = False, dir: Path | None = None) -> int:
    """Show where the official assets of an environment family are looked for and whether they are complete, or download them.

    Without them, environments run on generated stand-ins. Exit status 1 if the assets asked about are not complete.

    Args:
        name: the family's word, such as `libero`; all of them by default.
        download: fetch them from the Hugging Face hub. Files that are there already are not loaded again.
        dir: the folder of this family's assets, instead of NAME in $VLAHUB_ASSETS or in ~/.cache/vlahub/assets.
    """
    from vlahub import assets as packs

    if not name:
        if download or dir:
            raise ValueError(f"say which assets: vlahub assets NAME --download; known are {', '.join(packs.PACKS) or 'none'}")
        for pack in packs.PACKS.values():
            print(
                f"{pack.name}: {pack.summary}\n    {packs.find(pack.name) or f'not here: vlahub assets {pack.name} --download (at most {pack.megabytes} MB)'}"
            )
        return 0
    pack = packs.pack_of(name)
    if download:
        print(f"{pack.repository} (dataset on the Hugging Face hub), at most {pack.megabytes} MB. Licence: {pack.licence}")
        folder = packs.download(name, dir and dir.expanduser())
        print(f"complete: {folder}" + (f". In use where VLAHUB_ASSETS={folder.parent} or assets='{folder}' is given" if dir else ""))
        return 0
    states = {folder: packs.missing(name, folder) if folder.is_dir() else None for folder in ([dir.expanduser()] if dir else packs.folders(name))}
    print(f"{pack.summary} Licence: {pack.licence}")
    for folder, gone in states.items():
        print(f"    {folder}: " + ("does not exist" if gone is None else packs.complaint(gone) if gone else "complete"))
    if any(gone == [] for gone in states.values()):
        return 0
    print(f"not complete anywhere, so that environments run on generated stand-ins: {packs.how_to_get(name)}")
    return 1


# ------------------------------------------------------------------------------------------------ eval


def evaluate(
    env: str,
    policy: str,
    episodes: int | None = None,
    protocol: str = "",
    num_envs: int = 1,
    seed: int = 0,
    out: Path | None = None,
    execute: int | None = None,
    max_steps: int | None = None,
    timeout: float = 300.0,
    videos: int = 2,
    video_episodes: tuple[int, ...] = (),
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    env_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = (),
    policy_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = (),
) -> int:
    """Run a policy on an exact set of episodes and write results.json, report.html and videos.

    The same command continues an evaluation that was interrupted.

    Args:
        env: environment id; `vlahub list` shows them. `module:id` imports the module that registers it first.
        policy: a bundled id, a folder, a hub repository, `expert`, `random`, or `module:function` (batched observation -> actions [B, T, D]).
        episodes: how many, 50 by default; every task gets the same number of trials.
        protocol: run as a published evaluator does, by its name (LIBERO: openvla, openpi, lerobot, rlinf): its step limit and start, every trial of every task.
        num_envs: environments that run at once, each in its own process; the results do not depend on it.
        seed: decides the episodes, with their number.
        out: folder for everything written; runs/ENV-POLICY-SEED by default.
        execute: actions of each predicted chunk that run before the policy is asked again; the policy's own number by default.
        max_steps: control steps per episode; the environment's own limit by default.
        timeout: seconds that a simulation may take to start, reset or run a chunk; after that it counts as hung and its episode as aborted.
        videos: so many solved and so many unsolved episodes are recorded; 0 for none.
        video_episodes: record these episodes instead.
        device: where the policy runs; a GPU if there is one by default.
        dtype: of the policy's weights; the family's own by default.
        env_options: options of the environment, as key=value.
        policy_options: options of from_pretrained, as key=value.
    """
    from vlahub import evaluation

    env = _registered(env)  # a wrong id is cheap to find before the weights are loaded
    given = key_values("env-options", env_options)
    if protocol:
        evaluation.with_protocol(env, protocol, given)  # likewise
    loaded_with = key_values("policy-options", policy_options)
    player = _load_policy(policy, device, dtype, loaded_with)
    parts = (env, policy, *([protocol] if protocol else []), str(seed))
    out = out or Path("runs") / "-".join(part.strip("/.").replace("/", "_").replace(":", "_") for part in parts)
    results = evaluation.evaluate(
        env,
        player,
        episodes=episodes,
        protocol=protocol,
        num_envs=num_envs,
        seed=seed,
        out=out,
        execute=execute,
        max_steps=max_steps,
        timeout=timeout,
        videos=video_episodes or videos,
        env_options=given,
        policy_name=policy,
        policy_options=loaded_with,
        command="vlahub " + shlex.join(sys.argv[1:]),
        progress=True,
    )
    _show_results(results, out)
    return 0


def _registered(env: str) -> str:
    """The id, once the module before its colon is imported, as gymnasium.make does."""
    module, colon, env_id = env.rpartition(":")
    if colon:
        _import(module, f"--env {env}")
    return catalog.env_card(env_id).id


def _load_policy(name: str, device: str, dtype: str | None, policy_options: Mapping[str, Any]) -> Any:
    """The policy behind a name on the command line."""
    from vlahub import evaluation

    code = ":" in name and not Path(name).exists()
    if name in (evaluation.EXPERT, evaluation.RANDOM) or code:
        if policy_options or dtype:
            raise ValueError(f"--policy-options and --dtype are for checkpoints; {name!r} takes none")
        return _load_function(name) if code else name
    if "/" not in name and not Path(name).expanduser().is_dir():  # found out before torch is imported
        words = "`expert` and `random` need no checkpoint, ids read user/name, functions module:function"
        raise FileNotFoundError(f"--policy {name}: {name!r} is no folder in {os.getcwd()}; {words}. `vlahub list` shows the known ids")

    import torch

    import vlahub

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA answers with an AssertionError
        gpus = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "no GPU that this torch can use"
        raise ValueError(f"--device {device}: there is no such device here (cpu; {gpus}). `vlahub doctor` says more") from error
    return vlahub.Policy.from_pretrained(name, device=device, dtype=getattr(torch, dtype) if dtype else None, **policy_options)


def _load_function(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(_import(module, f"--policy {name}"), function)
    except AttributeError as error:
        raise ValueError(f"--policy {name}: {error}") from error


def _import(module: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # the module is there and lacks something itself
        raise ModuleNotFoundError(f"{flag}: there is no module {module!r} in {os.getcwd()} or among the installed packages") from error


def _show_results(results: Any, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vlahub.evaluation import instruction_of
    from vlahub.report import percent

    console = Console()
    table = Table("task", "instruction", "solved", "rate", "95 % interval", "steps", "aborted")
    for number, part in results.tasks.items():
        low, high = part.interval
        steps = "" if part.mean_length is None else f"{part.mean_length:.1f}"
        rate = percent(part.success_rate)
        words = (number, instruction_of(part.episodes), f"{part.successes}/{part.counted}", rate, f"{100 * low:.1f} to {100 * high:.1f}", steps, part.aborted)
        table.add_row(*map(_plain, words))
    console.print(table)
    for warning in results.warnings:
        console.print(_plain(f"warning: {warning}"), style="yellow", soft_wrap=True)
    console.print(_plain(results), style="bold", soft_wrap=True)
    console.print(_plain(f"report: {out / 'report.html'}"), soft_wrap=True)


# ------------------------------------------------------------------------------------------------ record


def record(
    env: str,
    policy: str,
    episodes: int,
    out: Path,
    num_envs: int = 1,
    seed: int = 0,
    format: Literal["v2.1", "v3.0"] = "v2.1",
    images: Literal["png", "jpeg", "video"] = "png",
    only_successes: bool = True,
    noise: Annotated[tuple[float, ...], tyro.conf.arg(metavar="[FLOAT ...]")] = (),
    labels: Literal["applied", "intended"] = "applied",
    after: int = 0,
    look_every: int = 1,
    first_trial: int = 0,
    execute: int | None = None,
    max_steps: int | None = None,
    timeout: float = 300.0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    env_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = (),
    policy_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = (),
) -> int:
    """Record demonstrations of the expert or a policy, with failures if asked for, as a LeRobot-format dataset, one row per control step.

    The same command continues a recording that was interrupted; more episodes extend a v2.1 dataset.

    Args:
        env: environment id; `vlahub list` shows them. `module:id` imports the module that registers it first.
        policy: `expert`, `random`, a bundled id, a folder, a hub repository, or `module:function`.
        episodes: how many are run; every task gets the same number of trials. None of them is an episode of an evaluation or of training.
        out: the dataset's folder.
        num_envs: environments that run at once, each in its own process; the dataset does not depend on it.
        seed: decides the episodes, with their number.
        format: of the dataset; openpi and RLinf read v2.1, lerobot from 0.4 on v3.0.
        images: how pictures are kept; png is lossless.
        only_successes: leave out episodes that were not solved; they are listed in any case. --no-only-successes keeps them.
        noise: standard deviation of Gaussian noise on every action, in action units, one number or one for each of an action's numbers; it holds for ten control steps.
        labels: with noise, record the actions that were applied (for a world model) or those that were intended (for behaviour cloning, which learns to recover).
        after: control steps that an episode goes on for once it was solved; world models and success classifiers need to see the solved state.
        look_every: control steps from one look to the next. Drawing takes most of a recording's time, and neighbouring pictures are alike: with 10, ten times the episodes in the same time.
            A row between looks repeats the observation before it; the column "observation.seen" says so, and training draws only rows that were seen.
        first_trial: of every task; the trials before it are left for evaluations, which begin with trial 0.
        execute: actions of each predicted chunk that run before the policy is asked again; the policy's own number by default.
        max_steps: control steps per episode; the environment's own limit by default.
        timeout: seconds that a simulation may take to start, reset or run a chunk.
        device: where the policy runs; a GPU if there is one by default.
        dtype: of the policy's weights; the family's own by default.
        env_options: options of the environment, as key=value.
        policy_options: options of from_pretrained, as key=value.
    """
    catalog.require(("pyarrow",), "train", "recording a dataset")
    from vlahub import record as recorder

    env = _registered(env)
    given = key_values("env-options", env_options)
    player = _load_policy(policy, device, dtype, key_values("policy-options", policy_options))

    result = recorder.record(
        env,
        player,
        episodes,
        out,
        num_envs=num_envs,
        seed=seed,
        version=format,
        images=images,
        only_successes=only_successes,
        noise=noise or 0.0,
        labels=labels,
        after=after,
        look_every=look_every,
        first_trial=first_trial,
        execute=execute,
        max_steps=max_steps,
        timeout=timeout,
        env_options=given,
        policy_name=policy,
    )
    for line in result.failures:
        words = f"lost: {line.aborted}" if line.aborted else "not solved"
        print(f"task {line.task}, trial {line.trial}, seed {line.seed}: {words}" + ("" if line.episode is None else f" (episode {line.episode})"))
    print(result)
    return 0 if result.written else 1


# ------------------------------------------------------------------------------------------------ plot


def plot(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("curves.png"), metrics: tuple[str, ...] = ()) -> int:
    """Draw the curves of training runs, several runs over each other, into one PNG.

    Args:
        runs: folders of runs (what a baseline prints at its start).
        out: the picture.
        metrics: names or patterns like `train/*`; by default success, return and losses, as far as the runs have them.
    """
    from vlahub import plot as plots

    print(plots.plot(runs, out, metrics))
    return 0
