"""One simulation with its run folder, progress, report and saved model: what `run` and `finetune` share."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console

from fedelta import __version__
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.planning import planned
from fedelta.algorithms.state import FederationState
from fedelta.cli.experiment import Sites
from fedelta.cli.guarantees import amount, collected
from fedelta.cli.held import Held
from fedelta.cli.models import Models, guaranteed
from fedelta.cli.options import RunSettings
from fedelta.cli.privacy import described, ledger_in
from fedelta.cli.releases import privacy_sections, sight_section
from fedelta.core.digest import digest
from fedelta.core.errors import BadInput, BudgetSpent, CannotResume, FedeltaError
from fedelta.core.examples import Examples
from fedelta.core.messages import Plain, Request
from fedelta.core.program import Fleet, Report, Sight, run
from fedelta.fleet.answer import Sites as SitesHere
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.objectives import IGNORED
from fedelta.learning.plan import Plan
from fedelta.learning.text import per_token
from fedelta.observe.card import Card
from fedelta.observe.folder import STATE, RunFolder, read_manifest
from fedelta.observe.manifest import differences, environment, flat
from fedelta.observe.mlflow_run import MLflow
from fedelta.observe.page import write_page
from fedelta.observe.progress import Progress
from fedelta.observe.report import run_page
from fedelta.observe.tensorboard_events import TensorBoard
from fedelta.observe.text import bytes_text, plural
from fedelta.observe.tracking import Tracker, Trackers, settings
from fedelta.privacy.ledger import MemoryLedger

THREADS = 1  # of PyTorch in each worker: part of the execution plan, since it changes floating-point bits


Rounds = Iterator[tuple[FederationState[Any], Report]]


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """How sites are reached that are not of this machine: their data are not looked at here."""

    fleet: Callable[[Federation[Any], RunFolder], AbstractContextManager[Fleet]]
    rounds: Callable[[Federation[Any], Fleet, FederationState[Any]], Rounds]  # as core.program.run


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """`federation` over `sites` in processes of this machine, or elsewhere, into the run folder of the settings."""

    title: str
    federation: Federation[Any]
    sites: Sites
    settings: RunSettings
    classes: tuple[str, ...] = ()  # names of the labels, for the overview
    elsewhere: Elsewhere | None = None
    console: Console = field(default_factory=lambda: Console(highlight=False))  # one for all, or progress is torn

    def run(self) -> None:
        """Run to the end, or from where the folder's last commit is; then save the model and the report."""
        console = self.console
        if self.settings.resume and not self.settings.out.is_dir():
            raise CannotResume(f"there is no run to resume in {self.settings.out}; start one without --resume")
        if self.settings.ledger is not None and self.federation.privacy is None:
            raise BadInput("--ledger has no effect without a guarantee; give the federation a `privacy`")
        if self.elsewhere is None:
            held = Held.of(self.sites, self.federation, console, self.classes)
        else:
            held = Held(classes=(), digests=dict.fromkeys(self.sites.names))
        start = self.federation.init()  # before the folder: a model that cannot be built leaves no run behind
        planned = replace(self, federation=replace(self.federation, plan=self._plan(console)))
        if not self.settings.resume:
            shared = planned if self.settings.ledger is None else planned._with_ledger()
            start = shared._solved(start, held, console)[0]  # nor does one that no noise makes private
        planned._run(start, held, console)

    def _run(self, start: FederationState[Any], held: Held, console: Console) -> None:
        with self._folder(held.digests, console) as folder:
            state, reports = folder.resume(start) if self.settings.resume else (None, [])
            guarded = self._with_ledger()
            state, private = guarded._solved(state or start, held, console)
            guarded._announce(console, held, state, reports, private)
            state = guarded._rounds(folder, state, reports, held, console)
            if reports:
                console.print(f"Ended after round {state.round}: {guarded.federation.finished(state)}.")
                guarded._conclude(folder, state, reports, held, console)

    def _with_ledger(self) -> "Simulation":
        """The same, with a ledger of privacy that outlives this process, if there is a guarantee."""
        own = self.federation.ledger
        if self.federation.privacy is None or (self.settings.ledger is None and not isinstance(own, MemoryLedger)):
            return self  # an experiment may bring a ledger
        ledger = ledger_in(self.settings.out, self.settings.ledger)
        return replace(self, federation=replace(self.federation, ledger=ledger))

    def _solved(self, state: FederationState[Any], held: Held, console: Console) -> tuple[FederationState[Any], str]:
        """The state with the noise of its guarantee, which workers that are forked then know, and what to say of it.

        Raises BudgetSpent if not even one round is left.
        """
        federation = self.federation
        guard, names = federation.guard, list(held.rows)
        if guard is None or not names:
            return state, ""
        fresh = state.round == 0 and not state.started
        with console.status("solving the noise") as status:
            state = federation.begun(state, self.sites.names)
            assert state.privacy is not None
            by_rows = {held.rows[name]: name for name in names}
            multipliers = []
            for done, rows in enumerate(sorted(by_rows)):
                status.update(f"solving the noise ({done} of {len(by_rows)} sizes of sites)")
                multipliers.append(guard.multiplier(state.privacy, rows))
            least = min(by_rows)  # the smaller, the more of its rows are in each step
            prospect = guard.prospect(state.privacy, by_rows[least], least) if fresh else None
        if prospect is not None and not prospect.rounds and federation.rounds:
            spent = guard.spent()
            already = f", of which {spent:.4g} is spent already" if spent else ""
            raise BudgetSpent(
                f"not one round fits into {amount(guard.privacy)}{already}; give a larger epsilon, or more noise"
            )
        return state, described(guard, multipliers, prospect, federation.rounds)

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
        manifest: dict[str, Plain] = {
            "title": self.title,
            "experiment": digest(self.federation),
            "model": self.federation.frozen(),
            "seed": self.federation.seed,
            "data": {"sites": dict(digests), "test": test.digest() if test is not None else None},
            "plan": {"threads": THREADS, **asdict(plan)},
            **environment(),
        }
        if self.elsewhere is not None:
            manifest["run"] = secrets.token_hex(16)  # by which sites know it again
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

    def _announce(
        self, console: Console, held: Held, state: FederationState[Any], reports: Sequence[Report], private: str
    ) -> None:
        overview = held.overview()
        if overview is not None and not reports:
            console.print(overview.table(), overview.summary())
        layout = self.federation.algorithm.parameters(state.algorithm).layout
        rounds = plural(self.federation.rounds, "round")
        sent = self.federation.algorithm.layout(state.algorithm, self.sites.names[0]).size
        each = self.federation.collect.shows is Sight.EACH
        ways = "each way" if each else "to each site"  # what hides an update makes it longer
        travel = f"{layout.size:,} parameters travel ({bytes_text(4 * layout.size)} {ways})"
        if sent != layout.size:
            travel = f"{layout.size:,} parameters are learned, of which a site sends {sent:,} ({bytes_text(4 * sent)})"
        console.print(
            f"{self.title}: {plural(len(self.sites.names), 'site')}, {travel}, {rounds}, seed {self.federation.seed}",
            markup=False,
        )
        if self.federation.collect.shows is Sight.SUM:
            text = f"Updates reach the coordinator {collected(self.federation)}."
            console.print(text, markup=False, soft_wrap=True)
        if private:
            console.print(private, markup=False, soft_wrap=True)
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
            with self._fleet(folder) as fleet, progress, self._trackers(folder, reports, console) as trackers:
                rounds = run if self.elsewhere is None else self.elsewhere.rounds
                done = rounds(self.federation, progress.watch(fleet), state)
                for state, report in done:
                    folder.add(state, report)
                    reports.append(report)
                    progress.show(report)
                    trackers.show(report)
        except KeyboardInterrupt:
            kept = f"{plural(folder.kept, 'round')} {'is' if folder.kept == 1 else 'are'} kept"
            raise click.Abort(f"{kept}. Continue with:\n  {self.settings.again}") from None
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

    def _trackers(self, folder: RunFolder, reports: Sequence[Report], console: Console) -> Trackers:
        """Those that the settings ask for, which have the rounds up to now."""
        asked, trackers = self.settings, list[Tracker]()
        done = list(reports) if asked.resume else None
        told = settings(self.federation) | dict(flat({k: v for k, v in folder.manifest.items() if k != "data"}))
        if asked.tensorboard is not None:
            trackers.append(TensorBoard(asked.tensorboard, told, done))
        if asked.mlflow is not None:
            mark = folder.path / "mlflow.json"
            trackers.append(MLflow(asked.mlflow, told, title=self.title, mark=mark, done=done))
        return Trackers(trackers, lambda text: console.print(f"warning: {text}", style="yellow", markup=False))

    @contextmanager
    def _fleet(self, folder: RunFolder) -> Iterator[Fleet]:
        names, spill = self.sites.names, folder.memory
        if self.elsewhere is not None:
            with self.elsewhere.fleet(self.federation, folder) as fleet:
                yield fleet
            return
        if self.settings.workers == 0:
            yield Local(self.federation, self.sites, names, threads=THREADS, spill=spill)
            return
        workers = min(self.settings.workers, len(names))
        with Workers(self.federation, self.sites, names, workers=workers, threads=THREADS, spill=spill) as fleet:
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
        saved = self._save(state, reports, folder.memory)
        page = self._report(folder, reports, held)
        if self.federation.test is not None and "test_loss" in metrics:  # a finished run may get a test set later
            console.print(test_line(metrics, _counted(self.federation.test)))
        console.print(f"{saved}\nReport: {page}", markup=False, soft_wrap=True)

    def _report(self, folder: RunFolder, reports: list[Report], held: Held) -> Path:
        """Write the HTML report of the rounds so far."""
        page = self.settings.out / "report.html"
        seen = sight_section(self.federation, reports)
        sections = [*privacy_sections(self.federation, reports), seen, *held.sections()]
        write_page(page, run_page(self.title, reports, manifest=folder.manifest, sections=sections))
        return page

    def _save(self, state: FederationState[Any], reports: Sequence[Report], memory: Path) -> str:
        """Where the model is now, or the folder with one for each site, where a part of it never left them."""
        federation, out = self.federation, self.settings.out
        models = Models(
            title=self.title,
            federation=federation,
            sites=len(self.sites.names),
            privacy=guaranteed(federation),
            classes=self.classes,
        )

        def told(card: Card) -> str:
            return card.text(reports, __version__)

        if not federation.algorithm.personal:
            return f"Model: {models.write(federation.model(state), out, 'model', told)}"
        if self.elsewhere is not None:
            return f"A model for each site: at that site alone; what they have in common is in {out / STATE}"
        folder, sites = out / "models", SitesHere(self.sites, memory)
        folder.mkdir(exist_ok=True)
        for name in self.sites.names:
            site = sites.of(Request(to=name, op="save", round=state.round))
            models.write(federation.model_at(state, site), folder, quote(name, safe=" "), told)
        return f"A model for each site: {folder}"


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
