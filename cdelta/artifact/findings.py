"""What a run found, as sentences computed from its tables: titles of figures and the last cell of
every notebook section.

Every number comes from the table that is passed in; nothing is typed. A sentence says less where
the table says less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import networkx as nx

OWN = "cdelta"
"""The key of the method under study."""


def percent(rate: float) -> str:
    """A rate as text, with a decimal only below 10 %."""
    value = 100 * rate
    return f"{value:.0f} %" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f} %"


def span(rates: Iterable[float], one=percent) -> str:
    """The least and the greatest of some rates: ``92-100 %``, or one number where they agree."""
    values = [value for value in rates if not np.isnan(value)]
    if not values:
        return "(nothing measured)"
    low, high = one(min(values)), one(max(values))
    return high if low == high else f"{low.removesuffix(' %')}–{high}"


def number(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    names = [str(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def box(found: str, means: str, not_means: str) -> str:
    """The end of a section as Markdown: what was found, what it means, what it does not mean."""
    parts = {"Found": found, "What it means": means, "What it does not mean": not_means}
    return "\n\n".join(f"**{name}.** {text}" for name, text in parts.items())


def _worst(table: pd.DataFrame, column: str) -> pd.Series:
    return table.loc[table[column].abs().idxmax()]


# ---------------------------------------------------------------------- the subject and its data


def base(table: pd.DataFrame) -> str:
    """What the base refuses, from rows ``category, kind, rate``."""
    rates = {kind: own["rate"] for kind, own in table.groupby("kind", sort=False)}
    if "target" not in rates:
        return ""
    benign = f" and {span(rates['benign'])} of the benign counterparts" if "benign" in rates else ""
    refused = span(rates["target"])
    return f"Before any edit the model refuses {refused} of the target categories{benign}"


# ---------------------------------------------------------------------- attribution and circuits


def depth(table: pd.DataFrame) -> str:
    """Where the masks lie, from rows ``category, layer, value`` (percent of the mask)."""
    shares = table.groupby(["layer", "category"])["value"].sum().unstack(fill_value=0)
    layer = shares.mean(axis=1).idxmax()
    return f"Layer {layer} holds {span(shares.loc[layer] / 100)} of every mask"


def scores(heads: dict, mlps: dict) -> str:
    """The part with the strongest score of every category, if it is the same one."""
    names = set()
    for category in heads:
        head, mlp = np.abs(heads[category]), np.abs(mlps[category])
        layer, index = np.unravel_index(head.argmax(), head.shape)
        names.add(f"MLP {mlp.argmax()}" if mlp.max() > head.max() else f"head {layer}.{index}")
    if len(names) == 1:
        return f"In every category {names.pop()} has the largest effect on refusal"
    return f"The largest effect on refusal: {listed(sorted(names))}"


def convergence(table: pd.DataFrame, steps: int) -> str:
    """The error of the preset's number of steps, per rule."""
    rows = table[table["gradients"] == steps].set_index("method")["edges"]
    rows = rows[rows.index.str.startswith("EAP-IG")]
    parts = [
        f"{name.removeprefix('EAP-IG ')} rule {percent(error)}" for name, error in rows.items()
    ]
    return f"Error of all edges with {steps} gradients: {listed(parts)}" if parts else ""


def agreement(table: pd.DataFrame) -> str:
    """Correlation per kind of reader, and the largest miss."""
    correlation = {
        kind: np.corrcoef(rows["exact"], rows["estimate"])[0, 1]
        for kind, rows in table.groupby("reader class", sort=False)
        if len(rows) > 2
    }
    miss = table.loc[(table["exact"] - table["estimate"]).abs().idxmax()]
    worst = min(correlation, key=correlation.get)
    return (
        f"Estimates follow the truth (r ≥ {correlation[worst]:.2f}, least into {worst}); "
        f"the largest miss: "
        f"{miss['source']} → {miss['reader']}, {miss['estimate']:.2f} for {miss['exact']:.2f} nats"
    )


def faithfulness(table: pd.DataFrame) -> str:
    """How much of the metric the edited circuits restore, from `tab_faithfulness`."""
    return (
        f"Alone, the circuits that are edited restore {span(table['f'])} of the metric; "
        f"without them {span(table['rest'])} is left"
    )


def graphs(drawn: Mapping[str, nx.DiGraph]) -> str:
    """Which part writes the strongest arrow into the logits, from `circuit_graph`s."""
    sources = []
    for graph in drawn.values():
        into = [(abs(score), source) for source, _, score in graph.in_edges("logits", data="score")]
        sources.append(max(into)[1] if into else "input")
    most = max(set(sources), key=sources.count)
    where = (
        "every category"
        if sources.count(most) == len(sources)
        else f"{sources.count(most)} of {len(sources)} categories"
    )
    return f"In {where} the strongest arrow into the logits comes from {most}"


def controls(table: pd.DataFrame, title=str) -> str:
    """In how many comparisons the circuit's ranking beats a control's."""
    beats = table[table["low"] > 0]
    lost = [
        name for name, rows in table.groupby("control", sort=False) if not (rows["low"] > 0).all()
    ]
    end = f"; not always: {listed([title(name) for name in lost])}" if lost else ""
    return f"The circuit beats its control in {len(beats)} of {len(table)} comparisons{end}"


def stability(table: pd.DataFrame, threshold: float) -> str:
    """Which variations change the circuit."""
    low = table[table["Jaccard"] < threshold]
    if low.empty:
        return f"No variation moves the circuit below the threshold of {threshold:g}"
    counts = low.groupby("variation", sort=False).size()
    parts = [f"{name} ({count})" for name, count in counts.items()]
    return f"{len(low)} of {len(table)} circuits fall below {threshold:g}: under {listed(parts)}"


def overlap(jaccard: pd.DataFrame, chance: float) -> str:
    """How much circuits share, against chance."""
    values = jaccard.to_numpy()[~np.eye(len(jaccard), dtype=bool)]
    shared = span(values, number)
    return f"Two categories' circuits share {shared} of their units; chance: {number(chance)}"


def parts(table: pd.DataFrame) -> str:
    """Which layers the parts that matter lie in."""
    total = table[table["effect"] == "total"]
    sizes = total["value"].abs().groupby(total["part"].str.extract(r"(\d+)", expand=False)).sum()
    layer = sizes.idxmax()
    return (
        f"Parts of layer {layer} carry {percent(sizes[layer] / sizes.sum())} of all parts' effect"
    )


def attention(table: pd.DataFrame) -> str:
    """Where the strongest heads look."""
    if table.empty:
        return ""
    shares = table.groupby("key")["value"].mean()
    most = percent(shares.max() / 100)
    return f"The circuits' heads spend {most} of their attention on: {shares.idxmax()}"


# ---------------------------------------------------------------------- the edit and its evaluation


def scale(table: pd.DataFrame, chosen: dict[str, float]) -> str:
    """The chosen k and what it refuses on validation."""
    target = table[table["kind"] == "target"]
    start = target[target["k"] == target["k"].min()]["rate"]
    best = target.loc[
        [abs(k - chosen.get(c, 1.0)) < 1e-9 for c, k in zip(target["category"], target["k"])]
    ]
    k = span(chosen.values(), lambda value: f"{value:.2g}")
    return f"k = {k} turns {span(start)} of the target refused into {span(best['rate'])}"


def matrix(table: pd.DataFrame) -> str:
    """Diagonal and largest rise off it, from `tab_matrix`."""
    rise = _rises(table)
    own = rise[
        (rise["prompt_kind"] == "harmful") & (rise["edit_category"] == rise["prompt_category"])
    ]
    rest = rise[~rise.index.isin(own.index)]
    sentence = f"Each edit refuses {span(own['refusal'])} of its own category"
    if rest.empty or not rest["rise"].abs().max():
        return sentence + "; nothing else moves"
    worst = _worst(rest, "rise")
    return (
        f"{sentence}; the largest side effect: "
        f"{worst['prompt_kind']} prompts of {worst['prompt_category']} "
        f"under the {worst['edit_category']} edit, {100 * worst['rise']:+.0f} points"
    )


def _rises(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `tab_matrix` beside the base's, with the `rise` over it."""
    keys = ["prompt_category", "prompt_kind"]
    base = table[table["edit_category"] == "base"].set_index(keys)["refusal"]
    edited = table[table["edit_category"] != "base"].reset_index(drop=True)
    before = base.reindex(pd.MultiIndex.from_frame(edited[keys])).to_numpy()
    return edited.assign(base=before, rise=edited["refusal"] - before)


def selectivity(table: pd.DataFrame, measure: str, title) -> str:
    """C-ΔΘ and the best other methods on one measure, from rows ``measure, method, category,
    rate``.
    """
    rows = table[(table["measure"] == measure) & (table["category"] == "all")]
    rates = rows.set_index("method")["rate"]
    if OWN not in rates:
        return ""
    others = rates.drop([OWN, "base"], errors="ignore").sort_values(ascending=False).head(2)
    best = [f"{title(name)} {percent(rate)}" for name, rate in others.items()]
    end = f"; next: {listed(best)}" if best else ""
    base = f" (base {percent(rates['base'])})" if "base" in rates else ""
    return f"{title(OWN)} refuses {percent(rates[OWN])} of the target{base}{end}"


def overrefusal(table: pd.DataFrame, title) -> str:
    """Refusal of the own category's borderline prompts, base against C-ΔΘ."""
    rows = table[(table["measure"] == "borderline") & (table["category"] != "all")]
    rates = {method: own["rate"] for method, own in rows.groupby("method", sort=False)}
    if OWN not in rates or rates[OWN].isna().all():
        return ""
    before = f", the base {span(rates['base'])}" if "base" in rates else ""
    return (
        f"{title(OWN)} refuses {span(rates[OWN])} of its own category's borderline prompts{before}"
    )


def ood(table: pd.DataFrame, title) -> str:
    """Refusal of unseen wordings by C-ΔΘ, per set."""
    rows = table[(table["method"] == OWN) & (table["category"] == "all")]
    parts = [f"{row.ood_set.replace('_', ' ')} {percent(row.rate)}" for row in rows.itertuples()]
    return (
        f"{title(OWN)} refuses, of wordings that no edit has seen: {listed(parts)}" if parts else ""
    )


def robustness(table: pd.DataFrame, title) -> str:
    """What attacks leave of C-ΔΘ's target refusal."""
    rows = table[(table["method"] == OWN) & (table["category"] == "all")].set_index("attack")[
        "rate"
    ]
    if "none" not in rows:
        return ""
    parts = [
        f"{percent(rate)} after {name.replace('_', ' ')}"
        for name, rate in rows.items()
        if name != "none"
    ]
    return f"{title(OWN)} refuses {percent(rows['none'])} of the target; {listed(parts)}"


def tradeoff(table: pd.DataFrame, title, cap: float = 0.05) -> str:
    """The highest target refusal of every method within a side effect of `cap`."""
    within = (
        table[table["x"] <= cap].groupby(["method", "category"])["y"].max().groupby("method").mean()
    )
    best = within.drop("base", errors="ignore").sort_values(ascending=False).head(3)
    parts = [f"{title(name)} {percent(rate)}" for name, rate in best.items()]
    return f"Most target refused at side effects of at most {percent(cap)}: {listed(parts)}"


def judges(table: pd.DataFrame) -> str:
    """Agreement of the first judge with every set of labels."""
    if table.empty:
        return ""
    first = table["judge"].iloc[0]
    parts = [
        f"{percent(row.accuracy)} of {row.n:.0f} labels ({row.data})"
        for row in table[table["judge"] == first].itertuples()
    ]
    return f"The judge ({first}) agrees with {listed(parts)}"


# ---------------------------------------------------------------------- deployment and ablations


def touched(changed: int, total: int) -> str:
    """How many entries of the checkpoint differ."""
    return f"{changed:,} of {total:,} entries differ on disk ({percent(changed / total)})"


def composition(table: pd.DataFrame) -> str:
    """What the largest sum of edits refuses."""
    sums = table[table["subset"] != "base"]
    size = sums["subset"].str.count(r"\+") + 1
    largest = sums[size == size.max()]
    aimed = largest[largest["edited"]]
    return f"{size.max()} edits at once refuse {span(aimed['refusal'])} of their categories"


def serving(table: pd.DataFrame, title) -> str:
    """Seconds of an answer, relative to the base's."""
    rows = table[table["method"] != "base"]
    parts = []
    for method, own in rows.groupby("method", sort=False):
        parts.append(f"{title(method)} {span(own['ratio'], number)}")
    return f"Time of an answer, relative to the base's: {listed(parts)}" if parts else ""


def budget(table: pd.DataFrame) -> str:
    """The circuit against random masks at the smallest budget that both have, from rows ``percent,
    mask, rate, low, high``.
    """
    wide = table.pivot_table(index="percent", columns="mask", values="rate").dropna()
    if wide.empty or not {"circuit", "random"} <= set(wide):
        return ""
    share, row = wide.index[0], wide.iloc[0]
    return (
        f"At {share:.2g} % of the parameters the circuit refuses {percent(row['circuit'])} of the "
        f"target, a random mask {percent(row['random'])}"
    )
