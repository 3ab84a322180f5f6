"""How one machine takes part in a run whose machines come and go."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator, model_validator

from thinwire.comm.address import split_address
from thinwire.comm.settings import Settings


class MembershipSettings(Settings):
    """Each machine has its own; only `secret` must be the same everywhere.

    listen: host:port to accept connections at; port 0 takes a free one.
    advertise: host:port where the others reach this machine; default: what listen has become.
    contacts: host:port of machines that may be in the run already: one that answers is enough. None: this machine
      founds the run, or goes on with the one in its log. Only one machine may found a run, and only once: a founder
      that has lost its log must be given contacts.
    name: for people; no two machines may have the same. Default: the advertised address.
    samples: directions that this machine tries in each round.
    wait_for: the founder commits no round before so many machines take part.
    heartbeat_s: seconds without other traffic after which the leader shows that it lives; members answer.
    suspicion_s: seconds of silence after which a machine is no longer waited for, and a leader is replaced.
    deadline_s: seconds after which a round is committed without those that live but have not answered.
    give_up_s: seconds without anything new committed after which begin() and commit() raise NoQuorumError; None: never.
    leave_s: seconds that close() takes at most to tell the others.
    remove_after: rounds in a row that a machine may miss before it loses its place; it may come back.
    adapt_samples: halve `samples` for this machine when it comes too late twice in a row.
    secret: text that all machines of the run share; without it the check bytes guard against damage alone.
    sync: write each record through to the disk before it counts as held, so that it outlives a power cut, too.
    """

    listen: str = "127.0.0.1:0"
    advertise: str = ""
    contacts: tuple[str, ...] = ()
    name: str = Field("", max_length=200)
    samples: int = Field(1, ge=1, le=1 << 15)
    wait_for: int = Field(1, ge=1, le=65535)
    heartbeat_s: float = Field(0.5, gt=0)
    suspicion_s: float = Field(2.0, gt=0)
    deadline_s: float = Field(30.0, gt=0)
    give_up_s: float | None = Field(600.0, gt=0)
    leave_s: float = Field(5.0, ge=0)
    remove_after: int = Field(50, ge=1)
    adapt_samples: bool = True
    secret: SecretStr = Field(SecretStr(""), validate_default=False)  # strict JSON has no such type
    sync: bool = True

    @field_validator("listen", "advertise")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            split_address(value)
        return value

    @field_validator("contacts")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            split_address(address)
        return value

    @model_validator(mode="after")
    def _in_order(self) -> MembershipSettings:
        if 2 * self.heartbeat_s > self.suspicion_s:
            raise ValueError(
                f"heartbeat_s: {self.heartbeat_s} with suspicion_s: {self.suspicion_s}: a machine would be suspected "
                "after one lost sign of life; give suspicion_s at least twice heartbeat_s"
            )
        if self.suspicion_s > self.deadline_s:
            raise ValueError(
                f"suspicion_s: {self.suspicion_s} with deadline_s: {self.deadline_s}: a round would end before a dead "
                "machine is noticed; give deadline_s at least suspicion_s"
            )
        if self.give_up_s is not None and self.give_up_s <= self.deadline_s + 2 * self.suspicion_s:
            raise ValueError(
                f"give_up_s: {self.give_up_s} leaves no time to replace a leader; give more than deadline_s + 2 * "
                f"suspicion_s = {self.deadline_s + 2 * self.suspicion_s}, or none"
            )
        host = split_address(self.listen)[0]
        if host in ("", "0.0.0.0", "::") and not self.advertise:
            raise ValueError(f"listen: {self.listen} is no address that others can reach; also give advertise")
        return self
