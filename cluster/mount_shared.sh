#!/usr/bin/env bash
# Mounts the file system that all nodes share on /mnt: `mount_shared.sh HOST:/PATH` (NFS 4.1, as EFS and Filestore speak it).
# Where something is mounted there already it does nothing.
set -euo pipefail
mountpoint -q /mnt && exit 0
command -v mount.nfs4 >/dev/null || { sudo apt-get update -qq; sudo apt-get install -y -qq nfs-common; }
sudo mount -t nfs4 -o nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport "$1" /mnt
[ -w /mnt ] || sudo chown "$(id -u):$(id -g)" /mnt
