"""Runs a step's network functions on a packet and does what they say, once the state they changed is committed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from datastore.compiled import INTERPRETED, inline, jit
from datastore.compiled.libc import address
from datastore.store import statuses
from nfs.dataplane import ledger as causes
from nfs.dataplane.declaration import DROP, FORWARD, TURN
from nfs.dataplane.engine import ADDING, CLAIMER, DROP_CAUSE, MOVED, NOW_NS, REPLICATES, STAGE, STEPS, TIMEOUT_S, TURNED, Engine
from nfs.dataplane.frames import Frames, give_frame
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.port import Port, tx_push
from nfs.dataplane.requests import ADD_COUNT, ATTEMPT, CAUSE, CLAIM_TIMEOUT_S, IDLE_TIMEOUT_S
from nfs.dataplane.requests import NOW_NS as ENV_NOW_NS
from nfs.dataplane.rewrite import turn_around, write_back
from nfs.dataplane.steps import ENV_AT, FUNCTION, MEMBERS, MEMBERS_END, OFFSET, REWRITES


@intrinsic
def _call(typingctx, function, packet, record, env):
    def generate(context, builder, signature, arguments):
        word = arguments[1].type
        kind = ir.FunctionType(ir.IntType(32), [word, word, word])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int32(types.uintp, types.uintp, types.uintp, types.uintp), generate


def _call_plain(function: int, packet: int, record: int, env: int) -> int:
    call = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3)(int(function))
    return int(call(int(packet), int(record), int(env)))


if INTERPRETED:
    _call = _call_plain


@inline
def step_of(engine: Engine, index: int) -> Any:
    """Return the number of the step that packet `index` is at; there is one."""
    stage = engine.stages[index, STAGE] & (TURNED - 1)
    return stage if engine.packets[index].arrived_from == INSIDE else engine.control[STEPS] - 1 - stage


@jit
def run_functions(engine: Engine, index: int, step: int, words: np.ndarray, at: int, attempt: int) -> int:
    """Run a step's functions on packet `index` and the record at word `at` of `words`; returns the verdict's code.

    What they ask for is in `control` (TIMEOUT_S, CLAIMER, ADDING) and in their envs.
    """
    control, env, members = engine.control, engine.env, engine.members
    control[TIMEOUT_S], control[CLAIMER], control[ADDING] = 0, -1, 0
    first, end = engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]
    inside = engine.packets[index].arrived_from == INSIDE
    code = np.int64(FORWARD)
    for n in range(first, end):
        member = n if inside else end - 1 - (n - first)
        at_env = members[member, ENV_AT]
        env[at_env + ENV_NOW_NS] = control[NOW_NS]
        env[at_env + IDLE_TIMEOUT_S] = env[at_env + CAUSE] = env[at_env + CLAIM_TIMEOUT_S] = env[at_env + ADD_COUNT] = 0
        env[at_env + ATTEMPT] = attempt
        code = np.int64(_call(np.uintp(members[member, FUNCTION]), address(engine.packets, index),
                              address(words, at + members[member, OFFSET]), address(env, at_env)))  # fmt: skip
        control[TIMEOUT_S] = max(control[TIMEOUT_S], env[at_env + IDLE_TIMEOUT_S])
        if env[at_env + CLAIM_TIMEOUT_S] > 0:
            control[CLAIMER] = at_env
        control[ADDING] |= env[at_env + ADD_COUNT]
        if code != FORWARD:
            cause = env[at_env + CAUSE]
            if code == DROP and cause > causes.FORWARDED and cause < causes.WAITING:
                code = DROP_CAUSE + cause
            for after in range(n + 1, end):
                env[members[after if inside else end - 1 - (after - first), ENV_AT] + ADD_COUNT] = 0
            break
    return code


@jit
def leave(engine: Engine, inside: Port, outside: Port, frames: Frames, index: int) -> None:
    """Forward packet `index` and account for it; its frame is handed on."""
    packet = engine.packets[index]
    at = packet.frame
    port = outside if packet.arrived_from == INSIDE else inside
    if tx_push(port, frames, at, np.int64(packet.length)):
        engine.ledger[causes.FORWARDED] += 1
    else:
        engine.ledger[causes.TRANSMIT_RING_FULL] += 1
        give_frame(frames, at)


@inline
def drop(engine: Engine, frames: Frames, index: int, cause: int) -> None:
    """Drop packet `index` for a named cause."""
    engine.ledger[cause] += 1
    give_frame(frames, engine.packets[index].frame)


@inline
def cause_of(status: int) -> Any:
    """Return the ledger's cause for a store's status that is an error."""
    return causes.TABLE_FULL if status == statuses.TABLE_FULL else causes.STATE_REFUSED


@inline
def refused_code(engine: Engine, status: int) -> Any:
    """Return the code for a record of this host that a function could not get."""
    if engine.control[REPLICATES] and (status == statuses.NOT_PRIMARY or status == statuses.STALE_EPOCH):
        return MOVED
    return DROP_CAUSE + cause_of(status)


@jit
def step_taken(engine: Engine, frames: Frames, index: int, step: int, code: int) -> bool:
    """Do what the verdict of a step says, now that its state is committed; returns False when the packet was dropped."""
    if code != FORWARD and code != TURN:
        drop(engine, frames, index, code - DROP_CAUSE if code >= DROP_CAUSE else causes.BY_VERDICT)
        return False
    if engine.steps[step, REWRITES]:
        write_back(frames.memory, engine.packets, index)
    engine.stages[index, STAGE] += 1
    if code == TURN:
        if engine.stages[index, STAGE] & TURNED:
            drop(engine, frames, index, causes.BY_VERDICT)
            return False
        turn_around(frames.memory, engine.packets, index)
        engine.stages[index, STAGE] = TURNED
    return True
