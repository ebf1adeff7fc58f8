# Sourced by hack/venv and hack/lock. uv reads no pip configuration: what pip was told of an index and of a certificate
# authority is told to uv.
index=$(python3 -m pip config list 2>/dev/null | sed -nE "s/.*\.index-url='(.*)'$/\1/p" | tail -n 1) || true
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
[ ! -s "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
