eval "$(cat "$1")"
