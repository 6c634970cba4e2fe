#!/usr/bin/env bash
# Starts a SLURM cluster of one node, this machine, for the tests of tests/test_clusters.py that need
# a real one. As root, on Debian:
#
#     apt-get install --yes --no-install-recommends slurm-wlm
#     tests/slurm.sh
#     make test-distributed ARGS="tests/test_clusters.py -k SLURM"
set -euo pipefail
host=$(hostname -s)
mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm /run/munge
cat >/etc/slurm/slurm.conf <<END
ClusterName=here
SlurmctldHost=$host
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
chown munge /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged
pkill -x slurmctld || true
pkill -x slurmd || true
sleep 1
slurmctld
slurmd
sinfo
