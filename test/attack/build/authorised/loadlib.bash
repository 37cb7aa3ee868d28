enable -f "$1" attack
