"""The judge that a user names: `length`, `reward:MODEL`, `implicit:MODEL`, or an endpoint."""

from __future__ import annotations

from smoldpo.evaluation.judges.base import Judge, LengthJudge
from smoldpo.models.builtin import BUILTIN
from smoldpo.utils.errors import UsageError, nearest

KINDS = (
    "length, reward:MODEL, implicit:MODEL[,REFERENCE], or an endpoint's URL (https://host/v1#model)"
)


def parse_judge(spec: str, day: str | None = None) -> Judge:
    """The judge that a user named; its model, if any, is found now and loaded when first asked.

        length                        the longer answer
        reward:MODEL                  a reward model: folder or hub id
        implicit:MODEL[,REFERENCE]    log π - log π_ref of a policy and its reference (builtin)
        http(s)://host/v1[#model]     an OpenAI-compatible endpoint

    Args:
        day: what a judge's chat template takes for today, as YYYY-MM-DD; by default the day of the
            run that its model came from, else today. A verdict then is the same on any day.

    Raises:
        UsageError: there is no such judge or model, or the URL is none.
        ModelError: as `find_model`, and as loading the model, which is tried.
    """
    kind, colon, rest = spec.partition(":")
    if kind.lower() in ("http", "https"):
        from smoldpo.evaluation.judges.endpoint import EndpointJudge

        return EndpointJudge(spec)
    if spec == "length":
        return LengthJudge()
    if kind in ("reward", "implicit") and colon:
        if not rest:
            raise UsageError(f"judge {spec}: name a model behind the colon, such as {kind}:FOLDER")
        from smoldpo.evaluation.judges.local_models import ImplicitJudge, RewardJudge

        if kind == "reward":
            return RewardJudge(rest, day)
        model, _, reference = rest.partition(",")
        return ImplicitJudge(model, reference or BUILTIN, day)
    if kind == "length":
        raise UsageError("judge length: takes nothing behind a colon")
    near = nearest(kind, ["length", "reward", "implicit"])
    raise UsageError(f"judge {kind}: there is none of this kind{near}; there are {KINDS}")
