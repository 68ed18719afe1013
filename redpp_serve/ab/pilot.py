"""What an A/B test with ``--auto`` does on its verdict, and the journal of what was decided, when and on which numbers.

The pilot only decides; the supervisor moves users. It climbs the ramp while every limit is kept, promotes a version
that is faster, and rolls back one that is slower or beyond a limit. Equally fast versions are left to a person: moving
users to one that gains nothing is no decision for a program. Where somebody else has moved users it stands back.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, SETTLE, STAND_BACK, START, Decision, decisions
from redpp_serve.ab.evidence import deciding
from redpp_serve.ab.spec import Spec, split_at
from redpp_serve.ab.state import DECISIONS
from redpp_serve.ab.status import Status
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

_ENDS = (PROMOTE, ROLLBACK, STAND_BACK)  # after these nothing more is decided
ENOUGH = 100  # requests of the pruned version that have to be judged at a share before the next
_BY_HAND = "Somebody has moved users, or the test's folder was lost: nothing more is decided without a person."


def users_now(status: Status) -> str:
    """Return where users go: an arm, or the split."""
    return status.all_to or str(status.split)


class Pilot:
    """Decides for one test, and writes down what was decided; it goes on where a killed supervisor's has ended.

    Args:
        state: the test's state folder.
        spec: the test.
    """

    def __init__(self, state: Path, spec: Spec) -> None:
        self._path, self._spec = state / DECISIONS, spec
        self._made = decisions(state)

    @property
    def made(self) -> list[Decision]:
        """What was decided so far."""
        return list(self._made)

    @property
    def last(self) -> Decision | None:
        """The last decision; None before the first."""
        return self._made[-1] if self._made else None

    def decide(self, status: Status, now: float) -> Decision | None:
        """Return what has to be done now, or None.

        Args:
            status: the test's.
            now: seconds since 1970.
        """
        users, last = users_now(status), self.last
        if last is None:
            return self._decision(START, users, "The test begins.", status, now)
        if not self._spec.auto or last.action in _ENDS:
            return None
        if users != last.users:
            return self._decision(STAND_BACK, users, _BY_HAND, status, now)
        if status.advice.kind == "rollback":
            return self._decision(ROLLBACK, ORIGINAL.name, status.advice.text, status, now)
        if status.problems or now - last.time < self._spec.hold * bool(self._spec.ramp):
            return None
        return self._forward(status, last, now)

    def _forward(self, status: Status, last: Decision, now: float) -> Decision | None:
        following = next((share for share in self._spec.ramp if share > status.split.pruned), None)
        if following is not None and following < 100:
            return self._climb(status, following, now)
        if self._spec.ramp and following is None:
            return None  # a ramp that ends below 100 stays there
        kind = deciding(status.findings).verdict.kind
        if status.advice.kind != "promote":
            return None
        if kind == "faster":
            return self._decision(PROMOTE, PRUNED.name, status.advice.text, status, now)
        if last.action == SETTLE:
            return None
        text = f"{status.advice.text} Nothing is gained by itself, so a person decides."
        return self._decision(SETTLE, users_now(status), text, status, now)

    def _climb(self, status: Status, share: Decimal, now: float) -> Decision | None:
        judged = status.strata.get(str(status.split), {}).get("judged", {})
        if judged.get(PRUNED.name, 0) < ENOUGH:
            return None
        text = f"No limit is broken after {judged[PRUNED.name]} requests at {status.split.pruned} % of users."
        return self._decision(RAMP, str(split_at(share)), text, status, now)

    def _decision(self, action: str, users: str, text: str, status: Status, now: float) -> Decision:
        return Decision(now, action, users, text, numbers_of(status))

    def write(self, decision: Decision) -> None:
        """Write down what was done.

        Raises:
            OSError: it cannot be written; it is remembered all the same.
        """
        self._made.append(decision)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(decision)) + "\n")


def numbers_of(status: Status) -> dict[str, Any]:
    """Return the numbers that a decision rests on, as plain values."""
    document = status.to_json()
    kept = {"verdicts": ("source", "measure", "kind", "low", "high", "mean")}
    kept["guardrails"] = ("name", "ok", "value", "low", "high", "limit")
    rows = {key: [{name: row[name] for name in names} for row in document[key]] for key, names in kept.items()}
    counts = {arm: {name: document["arms"][arm][name] for name in ("requests", "judged", "faults")} for arm in NAMES}
    return {**rows, "arms": counts, "strata": document["strata"], "advice": document["advice"]["reason"]}
