"""One simulation with its run folder, progress, report and saved model: what `run` and `finetune` share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fedelta.algorithms.federation import Federation, FederationState
from fedelta.algorithms.planning import planned
from fedelta.cli.experiment import Sites
from fedelta.cli.held import Held
from fedelta.cli.options import RunSettings
from fedelta.core import codec
from fedelta.core.digest import digest
from fedelta.core.errors import CannotResume, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.messages import Plain
from fedelta.core.program import Fleet, Report, run
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.objectives import IGNORED
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, processor, tokenizer
from fedelta.learning.saving import frozen_digest, save
from fedelta.learning.text import per_token
from fedelta.observe.files import replace_file
from fedelta.observe.folder import RunFolder, read_manifest
from fedelta.observe.manifest import differences, environment
from fedelta.observe.page import write_page
from fedelta.observe.progress import Progress
from fedelta.observe.report import run_page
from fedelta.observe.text import bytes_text, plural

THREADS = 1  # of PyTorch in each worker: part of the execution plan, since it changes floating-point bits


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """`federation` over `sites` in processes of this machine, into the run folder of the settings."""

    title: str
    federation: Federation[Any]
    sites: Sites
    settings: RunSettings
    classes: tuple[str, ...] = ()  # names of the labels, for the overview

    def run(self) -> None:
        """Run to the end, or from where the folder's last commit is; then save the model and the report."""
        console = Console(highlight=False)
        if self.settings.resume and not self.settings.out.is_dir():
            raise CannotResume(f"there is no run to resume in {self.settings.out}; start one without --resume")
        held = Held.of(self.sites, self.federation, console, self.classes)
        start = self.federation.init()  # before the folder: a model that cannot be built leaves no run behind
        planned = replace(self, federation=replace(self.federation, plan=self._plan(console)))
        planned._run(start, held, console)

    def _run(self, start: FederationState[Any], held: Held, console: Console) -> None:
        with self._folder(held.digests, console) as folder:
            state, reports = folder.resume(start) if self.settings.resume else (None, [])
            self._announce(console, held, state or start, reports)
            state = self._rounds(folder, state or start, reports, held, console)
            if reports:
                console.print(f"Ended after round {state.round}: {self.federation.finished(state)}.")
                self._conclude(folder, state, reports, held, console)

    def _plan(self, console: Console) -> Plan:
        """The plan with all that it leaves open chosen, or as it was in the run to be continued."""
        plan, chosen = self.federation.plan, self.settings.plan
        if self.settings.resume:
            manifest = read_manifest(self.settings.out)
            return plan.filled(Plan.parse(manifest.get("plan")))
        if chosen == "plain":
            return plan.plain
        if chosen != "auto":
            return plan.filled(Plan.parse(read_manifest(Path(chosen)).get("plan")))
        with console.status("choosing how sites are trained"):
            federation, said = planned(self.federation, self.sites, self.sites.names, workers=self.settings.workers)
        console.print(f"Sites are trained {said}.", markup=False, soft_wrap=True)
        return federation.plan

    @contextmanager
    def _folder(self, digests: dict[str, str | None], console: Console) -> Iterator[RunFolder]:
        plan, test = self.federation.plan.plain, self.federation.test
        # On the CPU, whatever the device: CUDA must not be in use when workers are forked. They inherit this copy.
        task = self.federation.algorithm.task
        working = task.flat(self.federation.seed, replace(plan, device="cpu"))
        manifest: dict[str, Plain] = {
            "title": self.title,
            "experiment": digest(self.federation),
            "model": frozen_digest(working.module),
            "seed": self.federation.seed,
            "data": {"sites": dict(digests), "test": test.digest() if test is not None else None},
            "plan": {"threads": THREADS, **asdict(plan)},
            **environment(),
        }
        every = self.settings.commit_every_s
        with (
            RunFolder.open(self.settings.out, every)
            if self.settings.resume
            else RunFolder.create(self.settings.out, manifest, every) as folder
        ):
            folder.check_same(manifest)
            for where, old, new in differences(folder.manifest.get("versions"), manifest["versions"]):
                warning = f"{where} was {old} when this run began and is {new} now: bits may differ"
                console.print(warning, style="yellow", markup=False, soft_wrap=True)
            yield folder

    def _announce(self, console: Console, held: Held, state: FederationState[Any], reports: Sequence[Report]) -> None:
        overview = held.overview()
        if overview is not None and not reports:
            console.print(overview.table(), overview.summary())
        layout = self.federation.algorithm.parameters(state.algorithm).layout
        rounds = plural(self.federation.rounds, "round")
        console.print(
            f"{self.title}: {plural(len(self.sites.names), 'site')}, {layout.size:,} parameters travel "
            f"({bytes_text(4 * layout.size)} each way), {rounds}, seed {self.federation.seed}",
            markup=False,
        )
        if reports:
            console.print(f"Resumed after round {state.round}.")
        elif self.settings.resume:
            console.print("Nothing was committed before the run was stopped; it starts anew.")

    def _rounds(
        self,
        folder: RunFolder,
        state: FederationState[Any],
        reports: list[Report],
        held: Held,
        console: Console,
    ) -> FederationState[Any]:
        progress = Progress(self.federation.rounds, done=len(reports), console=console)
        try:
            with self._fleet() as fleet, progress:
                rounds = run(self.federation, progress.watch(fleet), state)
                for state, report in rounds:
                    folder.add(state, report)
                    reports.append(report)
                    progress.show(report)
        except KeyboardInterrupt:
            console.print(
                f"Interrupted; {len(reports)} rounds are kept. Continue with:\n  {self.settings.again}",
                markup=False,
                soft_wrap=True,
            )
            raise click.Abort from None
        except Exception:
            folder.commit()
            if reports:
                with suppress(FedeltaError):  # the error that ended the run is the one to be told
                    page = self._report(folder, reports, held)
                    console.print(f"Report: {page}", markup=False, soft_wrap=True)
            raise
        finally:
            folder.commit()
        return state

    @contextmanager
    def _fleet(self) -> Iterator[Fleet]:
        if self.settings.workers == 0:
            yield Local(self.federation, self.sites, self.sites.names, threads=THREADS)
            return
        workers = min(self.settings.workers, len(self.sites.names))
        with Workers(self.federation, self.sites, self.sites.names, workers=workers, threads=THREADS) as fleet:
            yield fleet

    def _conclude(
        self,
        folder: RunFolder,
        state: FederationState[Any],
        reports: list[Report],
        held: Held,
        console: Console,
    ) -> None:
        metrics = {name: value for report in reports for name, value in report.metrics.items()}
        sent = bytes_text(sum(report.bytes_up for report in reports))
        received = bytes_text(sum(report.bytes_down for report in reports))
        console.print(f"The sites sent {sent} and received {received}.")
        saved = self._save(state)
        page = self._report(folder, reports, held)
        if self.federation.test is not None and "test_loss" in metrics:  # a finished run may get a test set later
            console.print(test_line(metrics, _counted(self.federation.test)))
        console.print(f"Model: {saved}\nReport: {page}", markup=False, soft_wrap=True)

    def _report(self, folder: RunFolder, reports: list[Report], held: Held) -> Path:
        """Write the HTML report of the rounds so far."""
        page = self.settings.out / "report.html"
        write_page(page, run_page(self.title, reports, manifest=folder.manifest, sections=held.sections()))
        return page

    def _save(self, state: FederationState[Any]) -> Path:
        """The model: a folder that transformers or peft loads, or the state dict of another module."""
        module = self.federation.model(state)
        source = self.federation.algorithm.task.model
        if isinstance(source, Pretrained):
            folder = self.settings.out / "model"
            beside = tokenizer(source.source) if source.kind.reads_text() else processor(source.source)
            save(module, folder, beside)
            return folder
        path = self.settings.out / "model.safetensors"
        replace_file(path, codec.encode({name: tensor.detach() for name, tensor in module.state_dict().items()}))
        return path


def _counted(examples: Examples) -> int:
    """How many targets count: one an example, or those of its tokens."""
    return int((examples.targets != IGNORED).sum()) if per_token(examples.targets) else len(examples)


def test_line(metrics: Mapping[str, float], examples: int) -> str:
    """ "Test set: Average loss: 0.0321, Accuracy: 9897/10000 (98.97%)", without the accuracy where there is none."""
    line = f"Test set: Average loss: {metrics['test_loss']:.4f}"
    if "test_accuracy" in metrics:
        accuracy = metrics["test_accuracy"]
        line += f", Accuracy: {round(accuracy * examples)}/{examples} ({100 * accuracy:.2f}%)"
    if "test_perplexity" in metrics:
        line += f", Perplexity: {metrics['test_perplexity']:.2f}"
    return line
