"""The host is the shape that was asked for, with real systemd on a pure cgroup v2 tree."""

import subprocess
def run(host):
    print(subprocess.run("lscpu; lscpu -e; systemctl is-system-running; systemctl list-jobs; systemd-analyze blame|head -20; uname -a", shell=True, text=True, capture_output=True).stdout)
