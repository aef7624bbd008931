"""Ranks on the cluster that an ipyparallel profile describes: by SSH, in jobs of Slurm, and so on.

Hosts need share no folder, so the ranks meet over a port that the system chose on the host of
rank 0, and ipyparallel's nannies, not a look at the processes, tell of a death.
"""

from __future__ import annotations

import contextlib
import signal
from concurrent.futures import wait

import ipyparallel
from IPython.core.profiledir import ProfileDir, ProfileDirError
from IPython.paths import get_ipython_dir

from companion.parallel import engine
from companion.parallel.cluster import SILENT, Cluster, quiet_launcher


class Profile(Cluster):
    """The cluster of an ipyparallel profile: joined if it runs, otherwise started."""

    def __init__(self, name: str) -> None:
        super().__init__(_of_profile(name))
        self._joined = self._launcher.controller is not None

    def _launch(self, count: int, seconds: float) -> None:
        if not self._joined:
            self._launcher.start_cluster_sync(count)

    def _meeting(self, seconds: float) -> tuple[str, str]:
        return self._client[self._numbers[0]].apply_async(engine.hold).get(seconds), ""

    def stop(self) -> None:
        """Stop what this object started; of a cluster that ran already, only ranks that hang."""
        hung = [self._numbers[rank] for one, rank in self._sent.items() if not one.done()]
        if not self._joined:
            self._launcher.stop_cluster_sync()
        elif hung:
            wait([self._client.send_signal(signal.SIGKILL, targets=hung, block=False)], 5)
        super().stop()


def _of_profile(name: str) -> ipyparallel.Cluster:
    home = get_ipython_dir()
    try:
        folder = ProfileDir.find_profile_dir_by_name(home, name).location
    except ProfileDirError as error:
        advice = f"make it with `ipython profile create --parallel --profile={name}`"
        raise ValueError(
            f"profile is {name!r}; {home} holds none of that name; {advice}"
        ) from error
    with contextlib.suppress(FileNotFoundError):
        return ipyparallel.Cluster.from_file(profile_dir=folder, parent=None, log=SILENT)
    return quiet_launcher(profile_dir=folder)
