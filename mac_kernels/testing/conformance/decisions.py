"""Judges what a backend decided: nearest row, causes in order, ranges without gap or overlap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ...config import HeadTable, MacConfig
from ...types import Reason, StepTrace
from .cases import Case
from .rows import sketch_image
from .selection import kept_positions

if TYPE_CHECKING:
    from .session import Session, StepResult


def check_decisions(session: Session, result: StepResult, i: int, rows: dict[str, torch.Tensor] | None) -> None:
    """Check the decisions of entry ``i`` of a step against the ring rows [W, ...] it found (``None``: no ring)."""
    config, case, trace, t = session.config, session.case, result.trace, result.positions[i]
    check_ranges(config, case, trace, i, t, kept=kept_positions(session, result, i))
    matched = trace.matched_pos[i]
    if rows is None:
        assert bool((trace.reason[i] == Reason.NO_RING).all()), f"reason {trace.reason[i]} without a ring"
        assert not bool(trace.head_hit[i].any()), "a head hit without a ring"
        return
    if session.paused:
        want = Reason.SHORT_CONTEXT if t < config.min_context else Reason.BYPASSED
        assert bool((trace.reason[i] == want).all()), f"reason {trace.reason[i]} at {t} in a pause, should be {want}"
        assert not bool(trace.head_hit[i].any()) and bool((matched == -1).all()), f"a head at {t} matched in a pause"
        return
    if config.match_scope == "group":
        by_group = matched.view(-1, case.group)
        assert bool((by_group == by_group[:, :1]).all()), f"one group matched different rows at {t}: {by_group}"
    q_pre = session.truth[result.requests[i]].q_pre(result.q[i], t)
    distance, sure, pos = eligible_distance(config, case, rows, q_pre, t, session)
    score, best = _score(distance, case, config), _score(distance.masked_fill(~sure, math.inf), case, config).amin(0)
    tags = pos.tolist()
    for head, p in enumerate(matched.tolist()):
        if p < 0:
            assert math.isinf(float(best[head])), f"head {head} at {t} matched nothing, but a row is eligible"
            continue
        assert p in tags, f"head {head} at {t} matched {p}, which no row is tagged with"
        own, nearest = float(score[tags.index(p), head]), float(best[head])
        assert math.isfinite(own), f"head {head} at {t} matched {p}, which is not eligible"
        assert own <= nearest * (1 + session.margin) + 1e-5, (
            f"head {head} at {t} matched {p} at distance {own:.6g}, the nearest eligible row is at {nearest:.6g}"
        )
        reported, true = float(trace.distance[i, head]), float(distance[tags.index(p), head])
        assert abs(reported - true) <= session.margin * true + 1e-4, f"head {head} at {t}: {reported}, in truth {true}"
    _check_reasons(session, result, i, rows, q_pre)


def eligible_distance(
    config: MacConfig, case: Case, rows: dict[str, torch.Tensor], q_pre: torch.Tensor, t: int, session: Session
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact distance [W, Hq] to every row that may be matched (else ``inf``), which surely may, and tags [W]."""
    pos = rows["pos"].long()
    window = (pos >= 0) & (pos < t) & (pos > t - config.window)
    allowed = window[:, None] & torch.isfinite(rows["lse2"])
    sure = allowed
    if config.nominees is not None:
        whole = allowed.view(len(pos), -1, case.group).all(-1)
        maybe, surely = (
            allowed & rows_of_group.repeat_interleave(case.group, 1)
            for rows_of_group in _nominated(config.nominees, rows, q_pre, whole, session)
        )
        allowed, sure = maybe, surely
    distance = (rows["q_pre"].double() - q_pre).square().sum(-1).sqrt()
    return torch.where(allowed, distance, torch.inf), sure, pos


def _nominated(
    count: int, rows: dict[str, torch.Tensor], q_pre: torch.Tensor, allowed: torch.Tensor, session: Session
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [W, Hkv] that may be among the ``count`` nearest by sketch, and those that surely are."""
    assert session.rings.sketch is not None
    image = sketch_image(session.rings.sketch, q_pre)
    scale = image.abs().amax(-1, keepdim=True) / 127
    image = (image / scale).round() * scale
    stored = rows["sketch"].double() * rows["sketch_scale"].double()[..., None]
    distance = torch.where(allowed, (stored - image).square().sum(-1), torch.inf)
    order = torch.cat((distance.sort(0).values, torch.full_like(distance[:1], torch.inf)))
    last, following = order[min(count, len(distance)) - 1], order[min(count, len(distance))]
    found = torch.isfinite(distance)
    return found & (distance <= last * (1 + session.margin)), found & (distance < following * (1 - session.margin))


def _score(distance: torch.Tensor, case: Case, config: MacConfig) -> torch.Tensor:
    if config.match_scope == "head":
        return distance
    worst = distance.view(len(distance), -1, case.group).amax(-1)
    return worst.repeat_interleave(case.group, dim=1)


def _check_reasons(
    session: Session, result: StepResult, i: int, rows: dict[str, torch.Tensor], q_pre: torch.Tensor
) -> None:
    """Recompute every cause from the matched rows; where one is too close to call, the group is passed over."""
    config, case, trace, t = session.config, session.case, result.trace, result.positions[i]
    request, matched = result.requests[i], result.trace.matched_pos[i]
    root = math.sqrt(2 * case.head_dim)
    tags = rows["pos"].tolist()
    k, v = session.k[request], session.v[request]
    bound = session.truth[request].weight_bound(t, result.q[i], k, v, matched)
    for kv_head in range(case.kv_heads):
        causes, close = set(), False
        for head in range(kv_head * case.group, (kv_head + 1) * case.group):
            found, own = int(matched[head]) >= 0, set()
            if t < config.min_context:
                own.add(Reason.SHORT_CONTEXT)
            if not found:
                own.add(Reason.NO_ROW)
            else:
                row = tags.index(int(matched[head]))
                d = float((rows["q_pre"][row, head].double() - q_pre[head]).norm())
                threshold = _of_head(config.thresholds, session.layer, head, config.threshold)
                influence = float(bound[head]) * d / root * _of_head(config.influence_scale, session.layer, head, 1.0)
                limits = [(d, root * (1 - threshold), Reason.DISTANCE)]
                if config.influence is not None:
                    limits.append((influence, config.influence, Reason.INFLUENCE))
                for value, limit, cause in limits:
                    close = close or abs(value - limit) <= session.margin * abs(limit)
                    if not value < limit:
                        own.add(cause)
                if config.max_age is not None and t - int(rows["anchor"][row, kv_head]) > config.max_age:
                    own.add(Reason.AGE)
            causes |= own
            if not close:
                assert bool(trace.head_hit[i, head]) == (not own), f"head {head} at {t}: head_hit, but {own}"
        if not close:
            got, want = Reason(int(trace.reason[i, kv_head])), min(causes, default=Reason.HIT)
            assert got == want, f"kv head {kv_head} of request {request} at {t}: {got.name}, should be {want.name}"
        session.judged[0] += not close
        session.judged[1] += close


def _of_head(table: HeadTable | None, layer: int, head: int, default: float) -> float:
    return default if table is None else table[layer][head if len(table[layer]) > 1 else 0]


def check_ranges(config: MacConfig, case: Case, trace: StepTrace, i: int, t: int, *, kept: torch.Tensor) -> None:
    """``[0, F) + [F, E(p)) + [E(p), E(m)) + [E(m), m]`` is ``0..m``, and no more is read than that.

    A group reads those positions of the rest that are ``kept`` [Hkv, t + 1] for it.
    """
    stop = max(config.sinks, t + 1 - config.band)
    assert int(trace.kv_len[i]) == t + 1, f"kv_len {int(trace.kv_len[i])} at position {t}"
    assert int(trace.stop[i]) == stop, f"stop {int(trace.stop[i])} at {t}, should be {stop}"
    hit = (trace.reason[i] == Reason.HIT).repeat_interleave(case.group)
    reuse = hit if config.recompute_loaded_groups else trace.head_hit[i]
    for head, reused in enumerate(reuse.tolist()):
        p = int(trace.matched_pos[i, head])
        start = max(config.sinks, p + 1 - config.band) if reused else config.sinks
        got = int(trace.start[i, head])
        assert got == start, f"head {head} at {t} starts at {got}, should start at {start} (matched {p}, {reused=})"
    lowest = trace.start[i].view(-1, case.group).amin(1)
    rest = [int(kept[head, int(first) : stop].sum()) for head, first in enumerate(lowest)]
    read = [min(some + max(t + 1 - stop, 0) + config.sinks, t + 1) for some in rest]
    assert trace.kv_read[i].tolist() == read, f"kv_read {trace.kv_read[i].tolist()} at {t}, should be {read}"
