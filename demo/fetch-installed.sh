#!/bin/sh
# Fetches the package files of what is installed on this Debian machine:
# they are what the archive's signature vouches for.
#
#   fetch-installed.sh DIR [PACKAGE…]   default: every installed package
set -eu
mkdir -p "$1"
cd "$1"
shift
[ $# -gt 0 ] || set -- $(dpkg-query -W -f '${db:Status-Abbrev} ${binary:Package}=${Version}\n' | sed -n 's/^ii  *//p')
for p in "$@"; do
	apt-get -q=2 download "$p" >/dev/null 2>&1 || printf '%s: not in the archive any more; what it brought is not authorised\n' "$p" >&2
done
