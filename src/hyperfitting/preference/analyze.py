"""`hyperfit-preference analyze`: what the judgments of a study say, and how far they agree."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hyperfitting.errors import UserError
from hyperfitting.fields import at_least
from hyperfitting.formatting import estimate, printable_line
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.preference.agreement import (
    agreement,
    counts,
    fleiss_kappa,
    krippendorff_alpha,
)
from hyperfitting.preference.annotators import summarize_annotators
from hyperfitting.preference.comparisons import (
    Judged,
    Resampling,
    clusters,
    compare,
    share_estimates,
    strengths,
)
from hyperfitting.preference.correlation import correlations
from hyperfitting.preference.items import (
    ANALYSIS_FILE,
    FOLDER,
    JUDGMENTS_FILE,
    TASK_FILE,
    Choice,
    Task,
    read_task,
)
from hyperfitting.preference.judge_reliability import report_on_judges
from hyperfitting.preference.judgments import Judgment, read_judgments, validate
from hyperfitting.preference.pairing import text_hashes
from hyperfitting.preference.ranking import require_evalica
from hyperfitting.preference.results import (
    ANALYSIS_VERSION,
    PEOPLE,
    SCRIPTS,
    Agreement,
    Analysis,
    Group,
    ItemVotes,
    write_analysis,
)
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.record.schema import Record


def analyze(
    task: Task,
    judgments: Sequence[Judgment],
    records: Mapping[str, Record],
    resampling: Resampling,
) -> Analysis:
    """Return the analysis of a study.

    Args:
        task: the study.
        judgments: of it, in order; what does not belong to it is left out and listed.
        records: by run, for the correlation with metrics.
        resampling: of all bootstraps.
    """
    accepted, rejected = validate(task, judgments)
    by_who: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in accepted:
        by_who[_who(task, judgment)].append(judgment)
    order = [who for who in (PEOPLE, SCRIPTS) if who in by_who]
    order += sorted(who for who in by_who if who not in order)
    return Analysis(
        analysis_version=ANALYSIS_VERSION,
        task=task.content_hash,
        sweep=task.sweep,
        form=task.question.form,
        texts=task.texts,
        resamples=resampling.resamples,
        seed=resampling.seed,
        left_out=[f"judgment {r.index + 1}: {r.reason}" for r in rejected],
        groups=[_group(task, who, by_who[who], records, resampling) for who in order],
        items=_item_votes(task, by_who),
    )


def _who(task: Task, judgment: Judgment) -> str:
    if judgment.is_model:
        return judgment.annotator
    return PEOPLE if task.annotators[judgment.annotator].kind == "person" else SCRIPTS


def _normal(task: Task, judgments: Sequence[Judgment]) -> Judged:
    """Return the judgments of normal items, with the items."""
    pairs = ((task.item(judgment.item), judgment) for judgment in judgments)
    return [(item, judgment) for item, judgment in pairs if item and item.kind == "normal"]


def _in_both_orders(judged: Judged) -> Judged:
    """Return a judge's judgments of the items that it was asked about in both orders."""
    orders = Counter(item.id for item, _ in judged)
    return [(item, judgment) for item, judgment in judged if orders[item.id] == 2]


def _group(
    task: Task,
    who: str,
    judgments: Sequence[Judgment],
    records: Mapping[str, Record],
    resampling: Resampling,
) -> Group:
    is_model = who not in (PEOPLE, SCRIPTS)
    judged = _normal(task, judgments)
    if is_model:
        judged = _in_both_orders(judged)
    annotators = summarize_annotators(task, judgments)
    excluded = {annotator.name for annotator in annotators if annotator.excluded}
    kept = [pair for pair in judged if pair[1].annotator not in excluded]
    preferences = [pair for pair in judged if pair[1].choice in ("first", "second")]
    ranking, v = strengths(judged, resampling)
    flip_rate = _flip_rate(judged, resampling) if is_model else None
    by_item: dict[str, list[Choice]] = defaultdict(list)
    for item, judgment in judged:
        by_item[item.id].append(judgment.choice)
    items = [item for item in task.items if item.id in by_item]
    return Group(
        who=who,
        judgments=len(judgments),
        comparisons=compare(judged, resampling),
        comparisons_without_excluded=compare(kept, resampling) if excluded else [],
        with_ties=_agreement(judged, resampling),
        without_ties=_agreement(preferences, resampling),
        strengths=ranking,
        tie_parameter=v,
        left=_left(preferences, resampling),
        flip_rate=flip_rate,
        refused=_refusal(task, flip_rate) if is_model else "",
        annotators=annotators,
        correlations=correlations(
            records,
            items,
            [by_item[item.id] for item in items],
            resampling.resamples,
            resampling.seed,
        ),
    )


def _agreement(judged: Judged, resampling: Resampling) -> Agreement:
    if len({judgment.annotator for _, judgment in judged}) < 2:
        return Agreement(alpha=None, kappa=None)
    table = counts([item.id for item, _ in judged], [judgment.choice for _, judgment in judged])
    alpha, kappa = (
        agreement(coefficient, table, resampling.resamples, resampling.seed)
        for coefficient in (krippendorff_alpha, fleiss_kappa)
    )
    return Agreement(alpha=alpha, kappa=kappa)


def _left(preferences: Judged, resampling: Resampling) -> Estimate | None:
    if not preferences:
        return None
    left = np.array([[judgment.shown == "left"] for _, judgment in preferences], dtype=float)
    return share_estimates(left, *clusters(preferences), resampling)[0]


def _flip_rate(judged: Judged, resampling: Resampling) -> Estimate | None:
    """Return the share of items that were answered differently with the sides swapped."""
    answers: dict[str, set[Choice]] = defaultdict(set)
    for item, judgment in judged:
        answers[item.id].add(judgment.choice)
    flips = [len(choices) > 1 for choices in answers.values()]
    return bootstrap_mean(np.array(flips, dtype=float), resampling.resamples, resampling.seed)


def _refusal(task: Task, flip_rate: Estimate | None) -> str:
    if flip_rate is None:
        return "it was not asked in both orders"
    if flip_rate.mean > task.max_flip_rate:
        return (
            f"it answers {flip_rate.mean:.0%} of {flip_rate.n} items differently with the sides "
            f"swapped, more than {task.max_flip_rate:.0%}"
        )
    return ""


def _item_votes(task: Task, by_who: Mapping[str, Sequence[Judgment]]) -> list[ItemVotes]:
    votes: dict[str, dict[str, Counter[Choice]]] = defaultdict(lambda: defaultdict(Counter))
    for who, judgments in by_who.items():
        for judgment in judgments:
            votes[judgment.item][who][judgment.choice] += 1
    return [
        ItemVotes(
            first=item.first.origin,
            second=item.second.origin,
            length=item.length,
            votes={who: dict(choices) for who, choices in votes[item.id].items()},
        )
        for item in task.items
        if item.kind == "normal" and item.id in votes
    ]


def study_folder(path: Path) -> Path:
    """Return the folder of a study, given it, or the sweep or record that it lies beside."""
    folder = path.parent if path.is_file() else path
    return folder if (folder / TASK_FILE).is_file() else folder / FOLDER


def read_records_of(task: Task, home: Path) -> dict[str, Record]:
    """Return the records of a study's runs that still hold the texts that were judged.

    Args:
        task: the study.
        home: the sweep's folder, with the runs' folders in it, or a single run's.
    """
    records = {}
    for run in dict.fromkeys(name.rpartition("/")[0] for name in task.texts):
        folder = home if home.resolve().name == run else home / run
        if (folder / RECORD_FILE).is_file():
            record = read_record(folder / RECORD_FILE)
            if all(task.texts.get(name) == value for name, value in text_hashes({run: record})):
                records[run] = record
    return records


def _run(arguments: argparse.Namespace) -> None:
    at_least("--resamples", arguments.resamples, 100)
    at_least("--seed", arguments.seed, 0)
    require_evalica()
    folder = study_folder(arguments.study)
    task = read_task(folder)
    judgments = read_judgments(folder / JUDGMENTS_FILE)
    if not judgments:
        raise UserError(
            "there are no judgments yet",
            field="study",
            value=folder / JUDGMENTS_FILE,
            hint="hyperfit-preference serve, import or judge",
        )
    records = read_records_of(task, arguments.records or folder.resolve().parent)
    analysis = analyze(task, judgments, records, Resampling(arguments.resamples, arguments.seed))
    write_analysis(folder, analysis)
    if analysis.judges:
        report_on_judges(folder)  # their agreement with what people have answered since
    _show(analysis, folder / ANALYSIS_FILE)


def _show(analysis: Analysis, path: Path) -> None:
    for problem in analysis.left_out:
        print(f"left out   {printable_line(problem)}")
    for group in analysis.groups:
        print(f"\n{group.who}: {group.judgments} judgments, {len(group.annotators)} annotators")
        for row in group.comparisons:
            if row.dataset is not None:
                continue
            share = estimate(row.preferred_or_equal, "{:.1%}")
            print(
                f"  {row.first.run}/{row.first.side} against {row.second.side}, "
                f"{row.length} tokens: preferred or equal {share} "
                f"({row.wins} wins, {row.ties + row.both_bad} ties, {row.losses} losses)"
            )
        for name, value in (("alpha", group.with_ties.alpha), ("left", group.left)):
            print(f"  {name:<6} {estimate(value, '{:.3f}') or 'undefined'}")
        for annotator in group.annotators:
            for reason in annotator.excluded:
                print(f"  the rule excludes {annotator.name}: {reason}")
        if group.refused:
            print(f"  refused: {group.refused}")
    print(f"\nanalysis   {path}")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `analyze`."""
    parser = commands.add_parser("analyze", help="analyze a study's judgments")
    parser.add_argument("study", type=Path, metavar="SWEEP|STUDY")
    parser.add_argument(
        "--records", type=Path, metavar="SWEEP", help="where its runs are (beside the study)"
    )
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.set_defaults(run=_run)
