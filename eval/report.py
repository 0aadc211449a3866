"""Several results on one page: samples, a summary, numbers beside best possible and chance, curves, worst cases.

    python eval/report.py --results generation.json reconstruction.json probe.json \\
        --pictures "sampled=demo/generated.png" --output report.html

--results are any result files of the programs of eval/, shown in this order. Files of the same name are told apart by
their folders: run1/generation.json run2/generation.json.
--runs draws the quick distances of training runs against epochs, images, GPU-seconds and FLOPs.
Results of generation.py that differ in one setting only (steps, guidance, or checkpoint-N in their path) are drawn as
a curve. Pictures that the programs wrote are shown if they still exist, else named. FILE.md beside the page has the
table as Markdown.
The page needs no network; the same files give the same page.
"""

from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.evaluation.convergence import read_convergence
from vtp_diffusion.evaluation.report import NOT_MEASURED, read_result, result_names, table_rows
from vtp_diffusion.evaluation.report_page import (
    convergence_charts,
    find_charts,
    find_pictures,
    html_page,
    markdown_table,
    markdown_text,
)
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_text


@dataclass(kw_only=True)
class ReportConfig(Settings):
    results: list[str] = setting(help="JSON files of the programs of eval/")
    output: str = setting(help="FILE.html; FILE.md is written beside it")
    pictures: list[str] = setting(default_factory=list, help="CAPTION=FILE: pictures to show first")
    runs: list[str] = setting(
        default_factory=list, help="run folders of train_dit/train.py: distance while it trained"
    )
    title: str = setting("Evaluation", "heading of the page")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output, ".html")
        table = Path(self.output).with_suffix(".md")
        if table.exists() and not Path(self.output).exists():
            raise ValueError(f"output {self.output} would replace {table}, which is no part of a report: give another")
        if not self.results:
            raise ValueError("results is empty: give at least one JSON file of a program of eval/")
        result_names(self.results)
        for word in self.pictures:
            caption, separator, file = word.rpartition("=")
            if not separator or not caption:
                raise ValueError(f"pictures must be CAPTION=FILE, got {word!r}")
            if not Path(file).is_file():
                raise ValueError(f"picture {file} is not there")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ReportConfig, argv, __doc__)
    names = result_names(config.results)
    results = [read_result(file, name) for file, name in zip(config.results, names, strict=True)]
    rows, charts = table_rows(results), find_charts(results)
    charts += [chart for run in config.runs for chart in convergence_charts(run, read_convergence(run))]
    given = [(caption, Path(file)) for caption, _, file in (word.rpartition("=") for word in config.pictures)]
    recorded = find_pictures(results)
    page = html_page(config.title, rows, charts, given, recorded, results)
    output = Path(config.output)
    write_text(output, page)
    write_text(output.with_suffix(".md"), f"# {markdown_text(config.title)}\n\n{markdown_table(rows)}")
    for row in rows:
        if row.value == NOT_MEASURED:
            print(f"{row.name}: not measured: {row.what}: {row.details}")
    for caption, file in recorded:
        if file is None:
            print(caption)
    numbers = sum(row.value != NOT_MEASURED for row in rows)
    shown = sum(file is not None for _, file in given + recorded)
    print(f"{numbers} numbers, {len(charts)} curves, {shown} pictures")
    print(f"written: {output}, {output.with_suffix('.md')}; next: open {output} in a browser")


if __name__ == "__main__":
    run(main)
