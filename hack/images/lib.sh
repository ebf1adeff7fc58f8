# Shared by the scripts of hack/images; sourced, not run.
CACHE=${FINETUNE_CACHE:-$HOME/.cache/finetune-operator}
mkdir -p "$CACHE"
t0=$SECONDS
say() { printf '[%4ds] %s\n' $((SECONDS - t0)) "$*"; }
die() { echo "${0##*/}: $*" >&2; exit 1; }
# buildah with its storage in the cache, so that layers outlive clusters and checkouts.
bah() { buildah --root "$CACHE/buildah" --runroot /run/finetune-buildah "$@"; }
