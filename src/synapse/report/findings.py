"""What a run shows, in sentences made from its numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from synapse.report.run import Run, open_run
from synapse.report.words import (
    Wording,
    blocks,
    fraction,
    interval,
    measured,
    number,
    quoted,
    sentence,
    share_interval,
)
from synapse.types import Figure

LARGE = 0.10
"""Accuracy that losing all rows must cost before an unharmed readout row is called re-supply."""


@dataclass(frozen=True)
class KeyNumber:
    """One number of the page's head."""

    name: str
    value: str
    spread: str
    """Interval and number of examples."""
    meaning: str


def summary_lines(run: Path | str, component: str | None = None) -> list[str]:
    """Return about six sentences on a run folder: accuracy, scopes, concentration, rankings, classes, redirection.

    They are about one component, the first of the study unless one is named; redirection is of the whole model and
    stands with the first. A sentence is left out where its numbers were not measured.

    Raises:
        RunFolderError: the folder cannot be read as a finished run.
        SettingsError: a component that was not studied.
    """
    return sentences(open_run(run, component))


def sentences(run: Run) -> list[str]:
    """Return the sentences of `summary_lines` for an open run."""
    made = (
        *(_accuracy(run), _scopes(run), _concentration(run), _rankings(run), _rank_stability(run), _classes(run)),
        _redirection(run) if run.is_first else "",
    )
    return [text for text in made if text]


def reaches_zero(figure: Figure) -> bool:
    """Return whether a figure cannot be told from 0: no value, or an interval that includes 0 or less."""
    return figure.value is None or (figure.low if figure.low is not None else figure.value) <= 0


def resupplied(run: Run) -> list[int]:
    """Return the blocks where ablation of the readout row shows re-supply rather than redundancy.

    These are the blocks where losing the whole readout row costs nothing that can be told from zero, while
    losing all rows costs at least `LARGE`: later blocks read the answer again from the other rows. There are none where
    the head reads every row.
    """
    return [
        layer
        for layer, row in _headroom(run, "readout").items()
        if not run.wording.reads_every_row
        and reaches_zero(row)
        and (rows := run.figure("stability", "headroom", "all", layer)) is not None
        and not reaches_zero(rows)
        and (rows.value or 0) >= LARGE
    ]


def cheapest_redirect(run: Run) -> tuple[str, str, Figure] | None:
    """Return source, target and budget of the smallest head edit that turns half of a class into another."""
    found = [
        (source, target, figure)
        for source, targets in run.section("vulnerability", "head_edit", "d50").items()
        for target in targets
        if (figure := run.figure("vulnerability", "head_edit", "d50", source, target)) is not None
        and figure.value is not None
    ]
    return min(found, key=lambda pair: pair[2].value or 0.0, default=None)


def cheapest_shift(run: Run) -> tuple[str, Figure] | None:
    """Return target and size of the smallest logit shift that turns half of the other examples into it."""
    found = [
        (target, figure)
        for target in run.section("vulnerability", "logit_shift", "d50")
        if (figure := run.figure("vulnerability", "logit_shift", "d50", target)) is not None
        and figure.value is not None
    ]
    return min(found, key=lambda pair: pair[1].value or 0.0, default=None)


@dataclass(frozen=True)
class BestRanking:
    """The ranking of highest ordering quality, the next one, and its lead."""

    method: str
    second: str
    lead: Figure


def best_ranking(run: Run, layer: int | None = None) -> BestRanking | None:
    """Return which ranking is the most faithful at a layer, or over all of them; None where none was judged."""
    keys = ("best_overall", run.judged_scope) if layer is None else ("best", run.judged_scope, layer)
    found, lead = run.section("faithfulness", *keys), run.figure("faithfulness", *keys, "lead")
    return BestRanking(str(found["method"]), str(found["second"]), lead) if lead is not None else None


def judged_place(run: Run, *keys: str) -> tuple[str, int, Figure] | None:
    """Return scope, layer and figure of the last place where a figure by scope and layer has a value.

    The readout row is looked at first: at the last block it is what the head reads.
    """
    for scope in run.scopes:
        for layer in reversed(range(run.n_layers)):
            figure = run.figure(*keys, scope, layer)
            if figure is not None and figure.value is not None:
                return scope, layer, figure
    return None


def key_numbers(run: Run) -> list[KeyNumber]:
    """Return the numbers of the page's head; those that were not measured are left out."""
    return list(_key_numbers(run))


def _key_numbers(run: Run) -> Iterator[KeyNumber]:
    def shown(name: str, figure: Figure | None, meaning: str, share: bool = False) -> Iterator[KeyNumber]:
        if figure is not None and figure.value is not None:
            value = fraction(figure.value) if share else number(figure.value)
            limits = share_interval(figure) if share else interval(figure)
            counted = f"n = {figure.n:,}" if figure.n else ""
            yield KeyNumber(name, value, ", ".join(part for part in (limits, counted) if part), meaning)

    chance = run.figure("clean", "chance")
    beside = f"; always the most frequent class: {number(chance.value)}" if chance else ""
    yield from shown("Accuracy", run.figure("clean", "accuracy"), f"of the unedited classifier{beside}")
    words = run.wording
    if not words.is_final:
        yield from shown(
            "Commitment depth",
            run.figure("stability", "commitment_depth"),
            f"from here on {words.lost('readout')} cannot be lost without cost",
        )
    if place := judged_place(run, "redundancy", "removable"):
        scope, layer, figure = place
        yield from shown(
            "Removable share",
            figure,
            f"of the units, highest ranked first, before 1 % of the accuracy is lost ({words.place(scope, layer)}"
            + (f"; {figure.note})" if figure.note else ")"),
            share=True,
        )
    if place := judged_place(run, "specialisation", "specificity"):
        scope, layer, figure = place
        yield from shown(
            "Specificity",
            figure,
            f"recall that a class loses with its own units, beyond what the others lose ({words.place(scope, layer)})",
        )
    if not run.is_first:
        return  # what follows is of the whole model
    if redirect := cheapest_redirect(run):
        source, target, figure = redirect
        meaning = f"‖ΔW‖ / ‖W‖ of the head that turns half of {quoted(source)} into {quoted(target)}"
        yield from shown("Smallest redirect", figure, meaning)
    if shift := cheapest_shift(run):
        target, figure = shift
        yield from shown("Smallest shift", figure, f"logits that turn half of the rest into {quoted(target)}")


def _headroom(run: Run, scope: str) -> dict[int, Figure]:
    """Return the headroom of a scope, by layer in order; blocks without a value are left out."""
    figures = {layer: run.figure("stability", "headroom", scope, layer) for layer in range(run.n_layers)}
    return {layer: figure for layer, figure in figures.items() if figure and figure.value is not None}


def _accuracy(run: Run) -> str:
    accuracy = run.figure("clean", "accuracy")
    if accuracy is None or accuracy.value is None:
        return ""
    text = f"The unedited classifier has an accuracy of {measured(accuracy)}"
    chance = run.figure("clean", "chance")
    if chance is not None and chance.value is not None:
        text += f", where always naming the most frequent class gets {number(chance.value)}"
    recalls = [(label, run.figure("clean", "recall", label)) for label in run.labels]
    known = [(label, recall) for label, recall in recalls if recall is not None and recall.value is not None]
    if known:
        label, recall = min(known, key=lambda pair: pair[1].value or 0.0)
        text += f"; its weakest class is {quoted(label)} with a recall of {measured(recall)}"
    return text + "."


def _scopes(run: Run) -> str:
    """Return what the scope control says: re-supply, use, or nothing that could be told apart."""
    words = run.wording
    row, rows = _headroom(run, "readout"), _headroom(run, "all")
    if words.reads_every_row:
        row = row or rows
    if not row:
        return ""
    if words.is_final:
        return (
            "Nothing comes after the input of the final linear map that could re-supply what is lost there, so all "
            "scopes are the same."
        )
    silent = [layer for layer, figure in row.items() if reaches_zero(figure)]
    if words.is_inner or words.reads_several_rows:
        return _scopes_of_several(run, row, rows, silent)
    if again := resupplied(run):
        most = max(again, key=lambda layer: row[layer].value or 0.0)
        least = min(again, key=lambda layer: rows[layer].value or 0.0)
        return (
            f"At {blocks(again)} ablation of the readout row{words.which} alone shows re-supply, not "
            "redundancy: losing the whole row costs no accuracy that can be told from zero (at most "
            f"{measured(row[most])}), while losing all rows costs at least {measured(rows[least])}, "
            "because later blocks read the answer again from the other tokens."
        )
    if not silent:
        least = min(row, key=lambda layer: row[layer].value or 0.0)
        return (
            f"Every block needs the readout row: losing it once costs at least {measured(row[least])} "
            f"(block {least}), so there is no block where later ones fully re-supply it."
        )
    if not rows:
        return (
            f"At {blocks(silent)} losing the whole readout row costs nothing that can be told from zero; "
            "no scope with all rows was run, so this may be re-supply and is no evidence of redundancy."
        )
    return (
        f"At {blocks(silent)} neither the readout row nor all rows cost more than {number(LARGE)} beyond "
        "doubt when they are lost, so re-supply and redundancy cannot be told apart there."
    )


def _scopes_of_several(run: Run, row: dict[int, Figure], rows: dict[int, Figure], silent: list[int]) -> str:
    """Return the same sentence where units inside a block are lost, or where the head reads several rows."""
    words = run.wording
    lost, everywhere = words.lost("readout") + words.which, words.lost("all")
    if not silent:
        least = min(row, key=lambda layer: row[layer].value or 0.0)
        return f"Every block counts: losing {lost} costs at least {measured(row[least])} ({words.layer(least)})."
    nothing = f"At {blocks(silent)} losing {lost} costs no accuracy that can be told from zero"
    if words.reads_every_row:
        most = max(silent, key=lambda layer: row[layer].value or 0.0)
        return f"{nothing} (at most {measured(row[most])}); all rows are lost at once, so this is no re-supply."
    if again := resupplied(run):
        most = max(again, key=lambda layer: row[layer].value or 0.0)
        least = min(again, key=lambda layer: rows[layer].value or 0.0)
        why = "the other rows make up for it" if words.is_inner else "later blocks read it again from the other rows"
        return (
            f"At {blocks(again)} losing {lost} costs no accuracy that can be told from zero (at most "
            f"{measured(row[most])}), while losing {everywhere} costs at least {measured(rows[least])}: {why}, so the "
            "first loss alone says nothing about redundancy."
        )
    if not rows:
        return f"{nothing}; no scope with all rows was run, so the other rows may make up for it."
    return (
        f"{nothing}, and losing {everywhere} costs no more than {number(LARGE)} beyond doubt, so it is open whether "
        "anything is used there."
    )


def _concentration(run: Run) -> str:
    """Return where the decision sits and whether the ranking found the units that carry it."""
    place = judged_place(run, "stability", "headroom")
    if place is None or reaches_zero(place[2]):
        return ""
    scope, layer, headroom = place
    depth = run.figure("stability", "commitment_depth")
    words = run.wording
    text = f"losing {words.lost(scope, layer)} costs {measured(headroom)}"
    if depth is not None and depth.value is not None and not words.is_final:
        carries = "cannot be lost without cost" if words.is_inner else f"carr{_y(words)} the decision"
        text = f"from relative depth {number(depth.value)} on {words.lost('readout')} {carries}: {text}"
    parts = []
    removable = run.figure("redundancy", "removable", scope, layer)
    if removable is not None and removable.value is not None:
        share = " ".join(part for part in (fraction(removable.value), share_interval(removable)) if part)
        caution = f" ({removable.note})" if removable.note else ""
        parts.append(f"{share} of its units, highest ranked first, can go before 1 % of the accuracy does{caution}")
    order = run.figure("stability", "ordering_quality", scope, layer)
    if order is not None and order.value is not None and order.low is not None and order.high is not None:
        if order.low > 0:
            verdict = "removing ranked units costs more than removing random ones"
        elif order.high < 0:
            verdict = "the ranking misleads, since random units cost more than the ranked ones"
        else:
            verdict = "the ranking cannot be told from a random order"
        parts.append(f"{verdict} (difference {measured(order)}, of that loss, averaged over the sizes)")
    return sentence("; ".join([text, *parts]))


def _rankings(run: Run) -> str:
    """Return which of several rankings is the most faithful, and whether the next one can be told from it."""
    scope, words = run.judged_scope, run.wording
    overall, best = run.section("faithfulness", "overall", scope), best_ranking(run)
    if best is None:
        return ""
    quality = run.figure("faithfulness", "overall", scope, best.method)
    assert quality is not None
    where = f"{words.scope(scope)}; mean over the {words.unit_of_depth}s where there is something to lose"
    more = "more of what there is to lose than removing random ones"
    if reaches_zero(quality):
        return (
            f"None of {len(overall)} rankings can be told from a random order: removing the units that the best, "
            f"{best.method}, ranks highest does not beyond doubt cost {more} (difference {measured(quality)}; {where})."
        )
    if reaches_zero(best.lead):
        beside = f"it cannot be told from {best.second}, the next (lead {measured(best.lead)})"
    else:
        beside = f"the next, {best.second}, costs less by {measured(best.lead)}"
    return (
        f"Of {len(overall)} rankings {best.method} is the most faithful: removing the units that it ranks highest "
        f"costs {more}, by {measured(quality)} ({where}); {beside}."
    )


def _rank_stability(run: Run) -> str:
    """Return how far the units that are ranked highest would be the same for other examples."""
    found = {layer: run.figure("rank_stability", "kuncheva", layer) for layer in range(run.n_layers)}
    values = {layer: index.value for layer, index in found.items() if index is not None and index.value is not None}
    if not values:
        return ""
    last, lowest = max(values), min(values, key=lambda layer: values[layer])
    index, settled = found[last], run.figure("rank_stability", "settled", last)
    assert index is not None
    noise = run.figure("rank_stability", "noise")
    by_noise = "" if noise is None else f"; {number(noise.value)}: as units that are all noise would"
    where = "" if run.wording.is_final else f" at {run.wording.layer(last)}"
    text = (
        f"Ranked again{f' by {run.method}' if run.method else ''} on {index.n} draws of the training examples, the "
        f"highest tenth of the units comes out {_sameness(index, noise)}{where}: Kuncheva's index is "
        f"{measured(replace(index, n=0))} (1: always the same{by_noise})"
    )
    if settled is not None and settled.value is not None:
        text += f", and {settled.value:.0f} {settled.note} units are there in 95 % of the draws or more"
    if lowest != last:
        text += f"; it is lowest at {run.wording.layer(lowest)}, {number(values[lowest])}"
    return text + "."


def _sameness(index: Figure, noise: Figure | None) -> str:
    """Return how much alike the tops of many rankings are, in words.

    The bounds 0.40 and 0.75 are those that Nogueira, Sechidis & Brown (JMLR 18(174), 2018) take over from the
    benchmarks for kappa of Fleiss, Levin & Paik.
    """
    value, low = index.value or 0.0, index.low or 0.0
    if noise is not None and low <= (noise.value or 0.0):
        return "no more alike than noise would"
    return "nearly the same" if value > 0.75 else "the same in part" if value >= 0.40 else "mostly different"


def _classes(run: Run) -> str:
    """Return how far classes have units of their own, and which one suffers most without them."""
    parts = []
    if place := judged_place(run, "specialisation", "specificity"):
        scope, layer, figure = place
        parts.append(
            f"removing the units that rank highest for a class ({figure.note or 'half of the width'}, "
            f"{run.wording.place(scope, layer)}) "
            + ("costs" if not reaches_zero(figure) else "does not beyond doubt cost")
            + f" that class more recall than it costs the others (by {measured(figure)})"
        )
        drops = [
            (label, run.figure("specialisation", "recall_drop", scope, layer, label, label)) for label in run.labels
        ]
        known = [(label, drop) for label, drop in drops if drop is not None and drop.value is not None]
        label, drop = max(known, key=lambda pair: pair[1].value or 0.0, default=("", None))
        if drop is not None and not reaches_zero(drop):
            parts.append(f"{quoted(label)} loses most of its own, {measured(drop)}")
    overlap, chance = (_last(run, "specialisation", name) for name in ("overlap", "overlap_chance"))
    if overlap is not None and chance is not None:
        where = "there" if run.wording.is_final else f"in block {overlap[0]}"
        parts.append(
            f"{where} the top tenths of two classes overlap by {number(overlap[1].value)}, "
            "where random "
            f"sets overlap by {number(chance[1].value)} {interval(chance[1])}".rstrip()
        )
    elif (last := run.figure("specialisation", "overlap", run.last)) is not None and last.note and not parts:
        parts.append(f"whether classes have units of their own cannot be said: {last.note}")
    return sentence("; ".join(parts))


def _redirection(run: Run) -> str:
    """Return how small a change of head or logits redirects half of the predictions."""
    parts = []
    if redirect := cheapest_redirect(run):
        source, target, figure = redirect
        text = (
            f"the smallest edit of the head that turns half of {quoted(source)} into {quoted(target)} is "
            f"{measured(figure, unit='of the norm of its weights')}"
        )
        control = run.figure("vulnerability", "head_edit_random", "d50", source, target)
        if control is not None and control.value is not None:
            text += f" (a random edit needs {number(control.value)})"
        elif control is not None:
            text += " (random edits turn fewer than half of them, however large)"
        parts.append(text)
    if shift := cheapest_shift(run):
        target, figure = shift
        parts.append(
            f"the smallest shift of the logits that turns half of the rest into {quoted(target)} is "
            f"{measured(figure, unit='logits')}"
        )
    return sentence("; ".join(parts))


def _last(run: Run, *keys: str) -> tuple[int, Figure] | None:
    """Return the last layer with a value, and the figure."""
    for layer in reversed(range(run.n_layers)):
        figure = run.figure(*keys, layer)
        if figure is not None and figure.value is not None:
            return layer, figure
    return None


def _y(words: Wording) -> str:
    """Return the end of `carry`: rows carry, a row carries."""
    return "y" if words.reads_several_rows else "ies"
