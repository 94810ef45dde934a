"""What came out of the testbed: numbers as JSON, one page of them, and whether a second run has the same bits."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..experiment import BASE, real_clips_pc
from ..files import write_atomically
from .game import GAME, REGIMES, SEEDS, SFT, Entry, Testbed, one_thread, sft_entry


if TYPE_CHECKING:
    from ..evaluation.statistics import PairedDifference

RESULTS = "results.json"
OVERALL = "all regimes"
_SAME_PLAY = ("game", "seeds", "regimes", "sentences")  # results that differ in one of these are not compared


def play(
    testbed: Testbed, entry: Entry, *, ratio: float | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """
    Run an entry, and fine-tuning beside it, where they are not whole; and write its results.

    Args:
        testbed ([`Testbed`]): Where.
        entry ([`Entry`]): The method.
        ratio (`float`, *optional*): Time of an update, in updates of fine-tuning, from earlier results; unset:
            measured.
        tell (`Callable`): Gets a line for each unit.

    Returns:
        `dict`: What stands in `results.json` of the entry's folder: rules, entry, versions, and of every unit the
        scores of every video, the held-out gaps and a hash of the weights.

    Raises:
        ValueError: As `Testbed.enter`, before anything is trained.
    """
    testbed.enter(entry)
    with one_thread():
        if ratio is not None:
            testbed.set_time(entry, ratio)
        cost = testbed.cost(entry)
        for each in dict.fromkeys((sft_entry().name, sft_entry(cost["time"]).name)):
            control = sft_entry() if each == SFT else sft_entry(cost["time"])
            testbed.enter(control)
            for line in testbed.run(control):
                tell(line)
        for line in testbed.run(entry):
            tell(line)
        found = _collect(testbed, entry, cost)
    write_atomically(testbed.folder / entry.slug / RESULTS, json.dumps(found))
    return found


def rules_of(testbed: Testbed, entry: Entry) -> dict[str, Any]:
    """What results of an entry will say of their rules, for [`check_others`] before they are made."""
    return {
        "game": asdict(testbed.game),
        "entry": json.loads(json.dumps(entry.describe())),
        "seeds": list(testbed.seeds),
        "regimes": list(testbed.regimes),
        "sentences": [prompt.text for prompt in testbed.sentences],
    }


def check_others(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """
    Whether results can stand in one table.

    Raises:
        ValueError: If one is no result, or was played by other rules, seeds or regimes; or if two entries have one
            name, of which a table would show one.
    """
    entries = {found["entry"]["name"]: found["entry"]}
    for other in others:
        if not {*_SAME_PLAY, "entry", "units"} <= {*other}:
            raise ValueError(f"Expected the {RESULTS} of an entry, got a file with {sorted(other)}.")
        name = other["entry"]["name"]
        different = [part for part in _SAME_PLAY if other[part] != found[part]]
        if different:
            raise ValueError(f"Results of {name!r} have another {', '.join(different)}: not compared.")
        if entries.setdefault(name, other["entry"]) != other["entry"]:
            raise ValueError(
                f"Two entries are called {name!r}: {entries[name]} and {other['entry']}. Give one another --name."
            )


def _collect(testbed: Testbed, entry: Entry, cost: Mapping[str, float]) -> dict[str, Any]:
    import torch

    from .. import __version__

    entries = {each.name: each for each in (entry, sft_entry(), sft_entry(cost["time"]))}
    rules = rules_of(testbed, entry)
    return {
        **rules,
        "cost": dict(cost),
        "equal_time": sft_entry(cost["time"]).name,
        "video_trl": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "real_pc": real_clips_pc(rules["sentences"]),
        BASE: [{name: float(score[name]) for name in ("pc", "sa")} for score in testbed.table(None).scores],
        "units": {name: _units(testbed, each) for name, each in entries.items()},
    }


def _units(testbed: Testbed, entry: Entry) -> list[dict[str, Any]]:
    found = []
    for regime, seed in testbed.units():
        unit, scores = testbed.unit(entry, regime, seed), testbed.table((entry, regime, seed)).scores
        assert unit is not None, "every unit of an entry that was run is whole"
        found.append({**unit, **{name: [float(score[name]) for score in scores] for name in ("pc", "sa")}})
    return found


# ---- The page -------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """
    One page of an entry's results, in Markdown: its rank among others, and regime by regime against fine-tuning.

    Args:
        found (`dict`): Results of the entry.
        others (list of `dict`, *optional*): Those of other entries, of this machine or another.

    Raises:
        ValueError: As in [`check_others`].
    """
    check_others(found, others)
    note = []
    if found["game"] != asdict(GAME):
        note = ["**A trial:** it shows that the method runs. It is no result."]
    elif not {*REGIMES} <= {*found["regimes"]} or not {*SEEDS} <= {*found["seeds"]}:
        note = [f"**A part of the game,** which has the regimes {', '.join(REGIMES)} and {len(SEEDS)} training seeds."]
    entry, cost = found["entry"], found["cost"]
    options = ", ".join(f"{name}={value!r}" for name, value in entry["options"].items())
    setting = (
        f"{entry['path']}{f' with {options}' if options else ''}. {len(found['regimes'])} regimes x "
        f"{len(found['seeds'])} training seeds, {len(found['sentences'])} held-out sentences. An update takes "
        f"{cost['time']:g} times the processor time of fine-tuning's, and {cost['memory'] / 2**20:.0f} MiB of tensors "
        f"beside the weights. video_trl {found['video_trl']}, torch {found['torch']}, {found['machine']}."
    )
    parts = [f"# Testbed: {entry['name']}", *note, setting, _ranking(found, others), _by_regime(found)]
    return "\n\n".join(parts) + "\n"


def _ranking(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    entries: dict[str, tuple[Mapping[str, Any], str]] = {}
    for result in (*others, found):  # the entry's own fine-tuning counts, where others have the same
        entries |= {name: (result, name) for name in result["units"]}
    rows = []
    for result, name in entries.values():
        units = result["units"][name]
        pc = _mean([value for unit in units for value in unit["pc"]])
        base = _mean([row["pc"] for row in result[BASE]])
        gaps = [_gaps(units, gap) for gap in ("win_gap", "lose_gap")]
        seconds = _mean([unit["cpu_seconds"] for unit in units])
        closed = f"{100 * (pc - base) / (result['real_pc'] - base):.0f} %"
        over = _interval(_difference(result, name, BASE, OVERALL))
        rows.append((pc, [name, f"{pc:.3f}", closed, over, *gaps, f"{seconds:.0f}"]))
    rows.sort(key=lambda row: -row[0])
    header = ["rank", "method", "pc", "gap closed", "pc over base", "held-out win_gap", "held-out lose_gap", "CPU s"]
    table = _markdown([header, *([str(rank), *cells] for rank, (_, cells) in enumerate(rows, 1))])
    note = (
        f"Means over regimes and seeds. Gap: between the base model and lawful clips of the same sentences after the "
        f"autoencoder (pc {found['real_pc']:.3f}). Intervals: 95 %, bootstrap over sentences, of gaps over held-out "
        "rows; win_gap below 0: better than the base model at clips it has not seen. CPU s: of a training."
    )
    return f"## Ranking\n\n{table}\n\n{note}"


def _by_regime(found: Mapping[str, Any]) -> str:
    from ..evaluation.statistics import holm, prompt_sign_test, verdict

    name, controls = found["entry"]["name"], list(dict.fromkeys((SFT, found["equal_time"])))
    controls = [control for control in controls if control != name]
    places = [*found["regimes"], *([OVERALL] if len(found["regimes"]) > 1 else [])]
    pairs = [(place, control) for place in places for control in controls]
    raw = [prompt_sign_test(*_paired(found, name, control, place)) for place, control in pairs]
    adjusted = dict(zip(pairs, holm(raw), strict=True))
    header = ["regime", "pc", *(f"over {control}" for control in controls)]
    rows = [header]
    for place in places:
        cells = [place, f"{_mean(_paired(found, name, BASE, place)[0]):.3f}"]
        for control in controls:
            difference = _difference(found, name, control, place)
            words = verdict(difference, num_seeds=len(found["seeds"]), p_adjusted=adjusted[place, control])
            cells.append(f"{_interval(difference)}: {words}")
        rows.append(cells)
    regimes = "; ".join(f"{regime}: {REGIMES[regime][1]}" for regime in found["regimes"])
    note = (
        f"{SFT}: fine-tuning on the same clips with as many updates; the other column: in as much processor time. "
        f"Verdicts need {len(pairs)} sign tests corrected by Holm's method, and three seeds. "
    )
    return f"## By regime\n\n{_markdown(rows)}\n\n{note if pairs else ''}{regimes}."


def _paired(found: Mapping[str, Any], a: str, b: str, place: str) -> tuple[list[float], list[float], list[str]]:
    """`pc` of two entries (or the base model) on the same videos, and the sentence of each."""
    base = [row["pc"] for row in found[BASE]]
    units = [number for number, unit in enumerate(found["units"][a]) if place in (OVERALL, unit["regime"])]
    ours = [value for number in units for value in found["units"][a][number]["pc"]]
    theirs = [value for number in units for value in (base if b == BASE else found["units"][b][number]["pc"])]
    return ours, theirs, found["sentences"] * len(units)


def _difference(found: Mapping[str, Any], a: str, b: str, place: str) -> "PairedDifference":
    from ..evaluation.statistics import paired_bootstrap

    ours, theirs, sentences = _paired(found, a, b, place)
    return paired_bootstrap(ours, theirs, clusters=sentences)


def _gaps(units: Sequence[Mapping[str, Any]], name: str) -> str:
    from ..evaluation.statistics import paired_bootstrap

    gaps = [gap for unit in units for gap in unit[name]]
    rows = [row for unit in units for row in range(len(unit[name]))]
    if len(set(rows)) < 2:
        return f"{_mean(gaps):+.4f}"
    return _interval(paired_bootstrap(gaps, [0.0] * len(gaps), clusters=rows), "+.4f")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(found: "PairedDifference", form: str = "+.3f") -> str:
    return f"{found.difference:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


# ---- A second run ---------------------------------------------------------------------------------------------------


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """
    What two results of one entry differ in, to the last bit; empty if in nothing.

    Versions and processors are named first where they differ: they may explain the rest.
    """
    found = [
        f"{name}: {first[name]} and {second[name]}"
        for name in ("video_trl", "torch", "machine")
        if first[name] != second[name]
    ]
    if [row["pc"] for row in first[BASE]] != [row["pc"] for row in second[BASE]]:
        found.append("the base model's videos")
    for name, units in first["units"].items():
        for ours, theirs in zip(units, second["units"].get(name, []), strict=True):
            parts = [part for part in ("weights", "pc", "sa", "win_gap", "lose_gap") if ours[part] != theirs[part]]
            if parts:
                found.append(f"{name}, {ours['regime']}, seed {ours['seed']}: {', '.join(parts)}")
    return found
