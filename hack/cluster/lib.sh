# Shared by the scripts of hack/cluster and hack/images; sourced, not run.
# STATE holds one cluster's life (keys, etcd, logs, pids); CACHE outlives it (binaries, containerd's images).
VERSION=${KUBE_VERSION:-v1.35.4}
CACHE=${FINETUNE_CACHE:-$HOME/.cache/finetune-operator}
STATE=${STATE:-$HOME/.local/state/finetune-operator/cluster}
KUBE_BIN=$CACHE/kube/$VERSION
CONTAINERD_ROOT=$CACHE/containerd
NODE=node0 BRIDGE=ft0 NODE_IP=10.244.0.1 POD_CIDR=10.244.0.0/24 SVC_CIDR=10.96.0.0/16 SVC_IP=10.96.0.1
GPUS=4
KIND=finetune
export KUBECONFIG=$STATE/kubeconfig
export PATH=$PATH:$KUBE_BIN # kubectl, where the machine has none
mkdir -p "$CACHE"
t0=$SECONDS
say() { printf '[%4ds] %s\n' $((SECONDS - t0)) "$*"; }
die() { echo "${0##*/}: $*" >&2; exit 1; }

use_kind() { command -v kind >/dev/null && docker info >/dev/null 2>&1; }
# buildah keeps its storage in the cache, so that layers outlive clusters and checkouts.
bah() { buildah --root "$CACHE/buildah" --runroot "/run/finetune-buildah-$(cksum <<<"$CACHE" | cut -d' ' -f1)" "$@"; }
ctrk() { ctr -a "$STATE/containerd.sock" -n k8s.io "$@"; }
await() { # await SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1))
  until "${@:3}" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "$2 not ready after $1 s; see the logs in $STATE/log"
    sleep 0.2
  done
  say "$2 ready"
}

# A process is known by its pid file and by the program that this pid really runs: a reused pid is never touched.
# It goes on when its program's file is gone, with a checkout or by make clean.
pid_of() { # pid_of NAME: prints the pid when it runs NAME's program
  local p e
  p=$(cat "$STATE/run/$1.pid" 2>/dev/null) && [ -n "$p" ] && e=$(readlink "/proc/$p/exe") || return 1
  [ "${e% (deleted)}" = "$(cat "$STATE/run/$1.exe" 2>/dev/null)" ] && echo "$p"
}
start() { # start NAME PROGRAM ARGS...: in a session of its own, with pid file and log; remembered for restart
  pid_of "$1" >/dev/null && return 0
  printf '%q ' "${@:2}" >"$STATE/run/$1.cmd"
  readlink -f "$(command -v "$2")" >"$STATE/run/$1.exe"
  setsid nohup "${@:2}" >>"$STATE/log/$1.log" 2>&1 </dev/null &
  echo $! >"$STATE/run/$1.pid"
}
start_again() { local cmd; eval "cmd=($(cat "$STATE/run/$1.cmd"))"; start "$1" "${cmd[@]}"; }
stop() { # stop NAME...: SIGTERM to all, SIGKILL to those left after 10 s
  local n p
  for n; do ! p=$(pid_of "$n") || kill "$p" 2>/dev/null || true; done
  for n; do
    p=$(pid_of "$n") || continue
    timeout 10 tail -s 0.1 --pid="$p" -f /dev/null || { kill -9 "$p" && timeout 5 tail -s 0.1 --pid="$p" -f /dev/null; } 2>/dev/null || true
  done
  for n; do rm -f "$STATE/run/$n.pid"; done
}
running() { # pid, name and program of each process that start has started and that runs
  local f p
  for f in "$STATE"/run/*.pid; do
    f=$(basename "$f" .pid)
    ! p=$(pid_of "$f") || echo "$p $f $(cat "$STATE/run/$f.exe")"
  done
}
put() { # put FILE: standard input becomes the file's content in one step; an equal file is not touched
  cat >"$1.new"
  if cmp -s "$1.new" "$1"; then rm "$1.new"; else mv "$1.new" "$1"; fi
}
fake_gpus() { # the kubelet keeps them over its status updates, and drops them when it starts anew
  local r="{\"nvidia.com/gpu\":\"$GPUS\"}" n
  for n in $(kubectl get nodes -o name); do
    kubectl patch "$n" --subresource=status --type=merge -p "{\"status\":{\"capacity\":$r,\"allocatable\":$r}}" >/dev/null
  done
}
