#!/bin/sh
# What happens before a host enforces: keys, a signed build, a signed policy,
# and the host's state with every Debian package that it has.
#
#   prepare.sh PARTS OUT
#     PARTS  directory with ringwall, greeter, attack (made by the quickstart)
#     OUT    directory to make: keys, build, releases, policies, state
#   RINGWALL_DEBS   directory of the host's package files
#   RINGWALL_ROOT   directory that stands for the host's / (apt's signed lists)
#   RINGWALL_SCOPE  cgroup to govern; empty: the whole host
#   RINGWALL_ORIGINS  origins of trusted packages (Debian)
set -eu
parts=$(realpath "$1")
rw=$parts/ringwall
mkdir -p "$2/build"
cd "$2"
say() { printf '\n== %s\n' "$*"; }

say "Keys: a fleet of one, with a CA for builds, one for policies, one for permits"
"$rw" -q key init keys --name "Demo Fleet"

say "A build: a small service in Go, a tool and three scripts; catalogued and signed"
cp "$parts/greeter" "$parts/attack" build/
cp "$parts/tour.sh" build/
[ ! -e "$parts/fleet.sh" ] || cp "$parts/fleet.sh" build/
printf 'import bz2, json\nprint("hello from an authorised Python script")\n' >build/hello.py
printf '#!/bin/sh\necho "hello from an authorised shell script"\n' >build/hello.sh
chmod 755 build/*
"$rw" sign build --keys keys --product demo --version 1.0 --epoch 1 --out releases
"$rw" verify releases/demo_1.0.release.json --trust keys --content build

# policy EPOCH MODE: builds of this fleet, packages of Debian's archive, nothing else
policy() {
	printf 'version: 1\nname: demo\nepoch: %s\nbaseline: 1\nmode: %s\n' "$1" "$2"
	"$rw" key trust keys
	printf '  archives:\n    - name: debian\n      origins: [%s]\n      keyring: %s\n' "${RINGWALL_ORIGINS:-Debian}" "$(base64 -w0 /usr/share/keyrings/debian-archive-keyring.gpg)"
	cat <<-'POLICY'
		allow:
		  - rule: demo-builds
		    signer: {authority: Demo Fleet build CA, product: demo, min_epoch: 1}
		  - rule: debian-packages
		    package: {archive: debian, names: ["*"]}
		interpreters: # on top of the built-in ones: no code on the command line or in a pipe
		  - {name: python, inline: deny}
		  - {name: perl, inline: deny}
	POLICY
}

say "A policy: builds of this fleet, packages of Debian's archive, nothing else; signed"
policy 2 enforce >demo.yaml
"$rw" policy check demo.yaml
"$rw" policy sign demo.yaml --keys keys -o demo.policy.json
policy 1 audit >old.yaml # an attacker would like to have this one back
"$rw" -q policy sign old.yaml --keys keys -o old.policy.json
policy 3 audit >end.yaml # how the tour ends
"$rw" -q policy sign end.yaml --keys keys -o end.policy.json

say "The host's state: first trust, policy, release, and every package by its archive's signature"
"$rw" host init --state state --trust keys --policy demo.policy.json --release releases \
	${RINGWALL_ROOT:+--root "$RINGWALL_ROOT"} ${RINGWALL_DEBS:+--packages "$RINGWALL_DEBS"} ${RINGWALL_SCOPE:+--scope "$RINGWALL_SCOPE"}
