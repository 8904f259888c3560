# Shared by the scripts of this folder; sourced, not run.

# torch comes first and by exact version. On a machine with an NVIDIA GPU PyPI's build brings CUDA along; for a small CPU build
# set TTRL_TORCH to what PyTorch's "Get started" page gives for it, for example TTRL_TORCH="torch==2.13.0 --index-url ...".
TORCH_REQUIREMENT="${TTRL_TORCH:-torch==2.13.0}"

ensure_venv() {
  local python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ttrl needs Python 3.11 or newer (set PYTHON)" >&2; exit 1; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
}

install_ttrl() { # install_ttrl REQUIREMENT: skipped when pyproject.toml has not changed since the last time
  local stamp=".venv/.installed-$(printf '%s' "$1" | tr -c 'A-Za-z0-9' '_')"
  if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then return; fi
  # shellcheck disable=SC2086  # TTRL_TORCH may hold options
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet $TORCH_REQUIREMENT
  .venv/bin/python -m pip install --quiet --editable "$1"
  cp pyproject.toml "$stamp"
}
