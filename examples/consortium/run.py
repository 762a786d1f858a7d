"""A consortium of three hospitals on one machine, from its authority to a model: every command that its parties type.

    python examples/consortium/run.py --data FOLDER --out FOLDER

FOLDER of --data has the UCI heart disease records (processed.cleveland.data and three more). Each party gets a folder
in --out, which stands for its machine, and processes of its own; they meet over mutual TLS on 127.0.0.1.
docs/consortium.md walks through it.
"""

import hashlib
from pathlib import Path

from parties import Consortium, parsed, say, told


def main() -> None:
    with told():
        arguments = parsed(__doc__ or "")
        consortium = Consortium.at(arguments.out, arguments.data)
        with consortium.ended():
            found(consortium, arguments.data)
            deploy(consortium)
            compared(consortium, arguments.data)


def found(consortium: Consortium, data: Path) -> None:
    """Up to where everybody could take part."""
    say("1. Each hospital has its records, and everybody the experiment.\n")
    consortium.bring(data)
    say("2. The authority decides who takes part. Keys are made where they are used, and stay there.\n")
    consortium.certify(["127.0.0.1"])
    say("\n3. Each hospital looks at what would leave it, and writes the digest that it has read into its policy.\n")
    consortium.agree()


def deploy(consortium: Consortium) -> None:
    say("\n4. Somebody proposes a run in the clear. Hungary's policy refuses it, before anybody is called.\n")
    consortium.hospitals["hungary"].run(
        *("fedelta", "join", "experiment.py", "--set", "COLLECT=clear", "--at", "127.0.0.1:7443"),
        *("--certificates", "certificates", "--policy", "policy.toml"),
        status=2,
    )
    say("\n5. The run.\n")
    at = consortium.serve("127.0.0.1")
    for name in consortium.hospitals:
        consortium.join(name, at)
    consortium.finish()
    say()
    say((consortium.coordinator.folder / "serve.log").read_text())
    say("6. What left each hospital, by its own log.\n")
    for name, hospital in consortium.hospitals.items():
        hospital.run("fedelta", "departures", f"joined/{name}", "--last", "3" if name == "cleveland" else "0")


def compared(consortium: Consortium, data: Path) -> None:
    say("\n7. The same file as a simulation, in the clear. For this, all records have to be in one place.\n")
    consortium.same(data)
    import quality  # and PyTorch

    say("\n8. What it was good for: area under the ROC curve and accuracy on the records that hospitals hold back.\n")
    say(quality.table(quality.compare(data, consortium.coordinator.folder / "run" / "model.safetensors")))
    say("\n9. The model card, of what the coordinator knows.\n")
    card = consortium.coordinator.folder / "run" / "card.md"
    card.write_text(model_card(consortium))
    say(card.read_text())
    say(f"{card}\n{card.with_name('report.html')}")


def model_card(consortium: Consortium) -> str:
    """What whoever uses the model has to know, from the run's folder."""
    import experiment
    from fedelta.observe.folder import read_run

    folder = consortium.coordinator.folder / "run"
    manifest, reports = read_run(folder)
    last = reports[-1]
    seen = sum(report.bytes_up for report in reports)
    model = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = [
        ("model", f"logistic regression, {experiment.FEATURES} features; model.safetensors, SHA-256 {model}"),
        ("for", "whether a coronary vessel is narrowed; a demonstration, for no use in care"),
        ("hospitals", ", ".join(consortium.hospitals)),
        ("rounds", f"{last.round}; SHA-256 of the experiment {manifest['experiment']}"),
        ("updates", f"under masks, with identities: the coordinator saw sums; hospitals sent {seen:,} bytes in all"),
        ("missing values", "take a fixed middle; see experiment.py"),
        ("privacy", "not bounded: no noise was added"),
        ("accuracy", f"{last.metrics['validation_accuracy']:.1%} of the records that hospitals held back"),
        ("loss", f"{last.metrics['validation_loss']:.4f} on the same"),
    ]
    return "\n".join(
        ["# Heart disease", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
    )


if __name__ == "__main__":
    main()
