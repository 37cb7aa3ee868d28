# What may go wrong around the agent does not open the host: it is killed, frozen,
# starved of memory and of disk, flooded, restarted half way through a change of
# policy, and shown old and broken files. Run by guest_test.go after start.sh.
probe=/root/harness/probe
evil=/root/evil
wanted=/etc/systemd/system/sysinit.target.wants/ringwall-agent.service
# where nobody guards: told, not refused
dropin=/etc/systemd/system.control/ringwall-agent.service.d
epoch() { ringwall status --output json | sed -n 's/.*"epoch": *\([0-9]*\).*/\1/p' | head -n 1; }
agent_pid() { systemctl show -p MainPID --value ringwall-agent; }
# sign EPOCH: the same policy with a higher epoch
sign() {
	sed "s/^epoch: 3\$/epoch: $1/" /root/3.yaml >/root/next.yaml
	ringwall -q policy sign /root/next.yaml --keys "$prepared/keys" -o "/root/$1.policy.json" || bad "sign epoch $1"
}
# in_cgroup NAME: moves the agent into a cgroup of our own, whose switches are ours.
in_cgroup() {
	mkdir -p "/sys/fs/cgroup/$1"
	agent_pid 2>/dev/null >"/sys/fs/cgroup/$1/cgroup.procs"
}
# storm: an attack that goes on until calm, which counts what ran.
storm() {
	rm -f /dev/shm/calm
	$probe storm $evil /dev/shm/calm >/dev/shm/storm 2>&1 &
}
# calm TITLE
calm() {
	touch /dev/shm/calm
	wait
	case $(cat /dev/shm/storm) in
	tried=0\ * | *ran=[1-9]* | *refused=0*) bad "$1: $(cat /dev/shm/storm)" ;;
	tried=*) ok "$1: $(cat /dev/shm/storm)" ;;
	*) bad "$1: $(cat /dev/shm/storm)" ;;
	esac
}
# lost_so_far: events that the log tells as lost
lost_so_far() { ringwall events --output json | $probe sum /none | sed 's/.*lost=//'; }
# counted PATH N TITLE: N refusals are told, or told as lost since $before.
counted() {
	i=0
	while :; do
		ringwall events --output json | $probe sum "$1" >/run/sum
		told=$(sed 's/told=\([0-9]*\) .*/\1/' /run/sum) lost=$(($(sed 's/.*lost=//' /run/sum) - before))
		[ $((told + lost)) -ge "$2" ] && break
		i=$((i + 1))
		if [ $i -gt 60 ]; then
			bad "$3: of $2 refusals $told are told and $lost lost"
			return
		fi
		sleep 1
	done
	ok "$3: of $2 refusals $told are told, $lost counted as lost"
}

killed() {
	storm
	refused "kill -9" kill -9 "$(agent_pid)"
	refused "kill -STOP" kill -STOP "$(agent_pid)"
	for n in 1 2 3; do
		was=$(agent_pid)
		at=$(now)
		in_cgroup "victim$n" && echo 1 >"/sys/fs/cgroup/victim$n/cgroup.kill"
		i=0
		while [ "$(agent_pid)" = "$was" ] || [ "$(agent_pid)" = 0 ]; do
			i=$((i + 1))
			[ $i -lt 300 ] || { bad "systemd does not restart a killed agent"; break; }
			sleep 0.2
		done
		wait_for_agent
		ok "killed in a cgroup of the attacker's, a new agent took over ($at to $(now) s)"
	done
	works "the new agent proves that it enforces" ringwall host canary
	calm "an unlisted program during all of it"
}

frozen() {
	cp $evil /root/evil-frozen
	if ! { in_cgroup ice && echo 1 >/sys/fs/cgroup/ice/cgroup.freeze; } 2>/dev/null; then
		ok "the agent cannot be frozen"
		return
	fi
	before=$(lost_so_far)
	storm
	# more than the kernel keeps for an agent that does not read
	works "10,000 attacks while the agent is frozen" $probe flood 10000 /root/evil-frozen
	works "what is authorised runs meanwhile" sh -c 'ls -l / | sort'
	sleep 2
	calm "an unlisted program while the agent is frozen"
	echo 0 >/sys/fs/cgroup/ice/cgroup.freeze
	wait_for_agent
	counted /root/evil-frozen 10000 "thawed, the agent tells"
	[ "$lost" -gt 0 ] || bad "nothing was lost: this did not test a gap"
	systemctl restart ringwall-agent
	wait_for_agent
	works "a restart by the service manager" rmdir /sys/fs/cgroup/ice
}

starved() {
	storm
	was=$(agent_pid)
	refused "memory runs out: the killer takes the one that uses it" $probe hog 8192
	wait_for_agent
	if [ "$(agent_pid)" = "$was" ]; then ok "and spares the agent"; else bad "the agent was killed"; fi
	if { in_cgroup small && echo 3M >/sys/fs/cgroup/small/memory.max; } 2>/dev/null; then
		sleep 5
		echo max >/sys/fs/cgroup/small/memory.max
	fi
	wait_for_agent
	calm "an unlisted program while memory is short"
	systemctl restart ringwall-agent
	wait_for_agent
}

flooded() {
	cp $evil /root/evil-flood
	before=$(lost_so_far)
	at=$(now)
	works "10,000 attacks as fast as they go" $probe flood 10000 /root/evil-flood
	printf 'note  from %s to %s s\n' "$at" "$(now)"
	refused "an attack after the flood" $evil
	wait_for_agent
	counted /root/evil-flood 10000 "the flood"
}

disk_full() {
	sign 4
	mkdir -p /dev/shm/full
	n=0
	while [ $n -lt 300 ]; do
		n=$((n + 1))
		cp $evil /dev/shm/full/$n
	done
	fallocate -l "$(($(df --output=avail -k / | tail -n 1) - 1024))K" /root/fill
	cat /dev/zero >/root/fill.more 2>/dev/null
	printf 'note  %s KiB free\n' "$(df --output=avail -k / | tail -n 1)"
	before=$(lost_so_far)
	storm
	ran=0
	for f in /dev/shm/full/*; do "$f" 2>/dev/null && ran=$((ran + 1)); done
	calm "an unlisted program while the disk is full"
	if [ $ran = 0 ]; then ok "300 more were refused while the disk was full"; else bad "$ran unlisted programs ran"; fi
	refused "no policy can be confirmed while the disk is full" ringwall host apply /root/4.policy.json
	in_cgroup full && echo 1 >/sys/fs/cgroup/full/cgroup.kill
	sleep 3
	wait_for_agent
	ok "an agent that was killed comes back although the disk is full"
	rm -f /root/fill /root/fill.more
	works "with room again the policy can be applied" ringwall host apply /root/4.policy.json
	sleep 4
	told=$(ringwall events --blocks --output json | grep -o '"path":"/dev/shm/full/[0-9]*"' | sort -u | wc -l)
	lost=$(($(lost_so_far) - before))
	if [ $((told + lost)) -ge 300 ]; then
		ok "of 300 refusals $told are told, $lost counted as lost"
	else
		bad "of 300 refusals $told are told and $lost lost"
	fi
	rm -r /dev/shm/full
}

clock_back() {
	host=$(ringwall status --output json | sed -n 's/^ *"host": *"\([0-9a-f]*\)".*/\1/p' | head -n 1)
	works "sign a permit" ringwall permit create --keys "$prepared/keys" --identity spiffe://demo.example/oncall --host "$host" --hours 0.02 --reason test -o /root/permit.json
	works "use it" ringwall permit use /root/permit.json
	works "break-glass lets it run" $evil
	i=0
	while $evil 2>/dev/null && [ $i -lt 120 ]; do
		i=$((i + 1))
		sleep 1
	done
	refused "the permit ran out" $evil
	sleep 3
	before=$(date +%s)
	date -s "@$((before - 7200))" >/dev/null
	refused "the clock goes back: the permit stays expired" ringwall permit use /root/permit.json
	refused "and so does what it let run" $evil
	in_cgroup victim9 && echo 1 >/sys/fs/cgroup/victim9/cgroup.kill
	sleep 2
	wait_for_agent
	date -s "@$((before + 60))" >/dev/null
}

old_online() {
	refused "an older policy, over the one that is stored" cp "$prepared/old.policy.json" $state/policy.json
	refused "the same by rename" mv /root/3.policy.json $state/policy.json
	refused "an older policy, handed in" ringwall host apply /root/3.policy.json
	refused "a lower floor" sh -c "echo >$state/floor/epoch"
}

killed_applying() {
	storm
	for n in 5 6 7; do
		sign $n
		ringwall host apply /root/$n.policy.json >/dev/null 2>&1 &
		applying=$!
		sleep "0.$(((n - 5) * 4 + 1))"
		in_cgroup "apply$n" && echo 1 >"/sys/fs/cgroup/apply$n/cgroup.kill"
		wait $applying
		sleep 2
		wait_for_agent
		e=$(epoch)
		if [ "$e" = $n ] || [ "$e" = $((n - 1)) ]; then ok "killed while it applied epoch $n: $e is in force"; else bad "killed while it applied epoch $n: '$e' is in force"; fi
		works "epoch $n is in force in the end" ringwall host apply /root/$n.policy.json
	done
	calm "an unlisted program during that"
}

upgraded() {
	mkdir -p /root/next
	cp /usr/bin/ringwall /root/next/ringwall
	printf x >>/root/next/ringwall
	works "sign a newer agent" ringwall sign /root/next --keys "$prepared/keys" --product ringwall --version 2.0 --epoch 1 --out /root/next-releases
	refused "an agent that nobody authorised" ringwall host upgrade /root/next/ringwall
	works "authorise it" ringwall host add-release /root/next-releases
	refused "something authorised that is no agent" ringwall host upgrade /bin/true
	refused "cp over the agent's program" cp /root/next/ringwall /usr/bin/ringwall
	storm
	works "the agent replaces itself" ringwall host upgrade /root/next/ringwall
	wait_for_agent
	calm "an unlisted program during that"
	works "the new program is installed" cmp /root/next/ringwall /usr/bin/ringwall
	works "and is what answers" sh -c 'ringwall status --output json | grep -q "$(sha256sum </root/next/ringwall | cut -c1-64)"'
	works "the service manager has it for the agent" sh -c 'test "$(readlink /proc/$(systemctl show -p MainPID --value ringwall-agent)/exe)" = /usr/bin/ringwall && systemctl is-active ringwall-agent'
	works "it proves that it enforces" ringwall host canary
	refused "its program is guarded" sh -c 'echo x >>/usr/bin/ringwall'
}

# crash: the machine stops without a word to anybody
crash() {
	echo $fails >/root/fails
	sync -f /root/fails
	reboot -ff
	sleep 60
}

case $RINGWALL_BOOT in
1)
	cp /bin/true $evil
	set_up
	printf x >>$evil
	upgraded
	killed
	frozen
	starved
	flooded
	disk_full
	clock_back
	old_online
	killed_applying
	sign 8
	sign 9
	# the crash comes while 8 is applied
	echo $fails >/root/fails
	sync
	ringwall host apply /root/8.policy.json >/dev/null 2>&1 &
	sleep 0.3
	reboot -ff
	sleep 60
	;;
2)
	wait_for_agent
	e=$(epoch)
	case $e in 7 | 8) ok "a crash while epoch 8 was applied: $e is in force" ;; *) bad "a crash while epoch 8 was applied: '$e' is in force" ;; esac
	refused "an unlisted program after the crash" $evil
	works "apply epoch 9" ringwall host apply /root/9.policy.json
	crash
	;;
3)
	wait_for_agent
	if [ "$(epoch)" = 9 ]; then ok "a crash right after epoch 9 was applied: it is in force"; else bad "epoch 9 is gone: $(epoch)"; fi
	refused "an unlisted program after the second crash" $evil
	# As if the disk were in another machine: a boot without the agent.
	refused "taking the agent out of the next boot" rm $wanted
	refused "a drop-in of its unit" sh -c 'echo "[Unit]" >/etc/systemd/system/ringwall-agent.service.d/x.conf'
	refused "in a directory of that name of root's own" mv /etc/systemd/system/ringwall-agent.service.d /root/moved
	refused "masking its unit" ln -sf /dev/null /etc/systemd/system/ringwall-agent.service
	touch /root/offline
	mkdir -p $dropin
	printf '[Unit]\nConditionPathExists=!/root/offline\n' >$dropin/offline.conf
	works "a drop-in elsewhere is in the status" sh -c "ringwall status | grep -q '^next boot.*$dropin/offline.conf'"
	sleep 25
	works "and is an alert" sh -c "ringwall events | grep -q $dropin/offline.conf"
	restart_guest
	;;
4)
	works "a boot without the agent, for changes of the disk" $evil
	rm /root/offline
	rm -r $dropin
	# one write before a boot, or a fault of the disk, does not open the host
	cp /root/3.policy.json $state/policy.json
	: >$state/anchor.json
	sed 's/"epoch": *[0-9]*/"epoch":1/' $state/floor/epoch >/root/floor.epoch
	cp /root/floor.epoch $state/floor/epoch
	mkfifo $state/events/x && mv $state/events/x $state/floor/clock
	# what a crash can leave behind does no harm
	head -c 700 /root/9.policy.json >$state/.policy.json.tmp-1
	echo '{' >"$state/releases/0000.cat"
	head -c 100 "$(find $state/packages -name '*.json' | head -n 1)" >"$state/packages/.x.json.tmp-2"
	head -c 1000 /dev/zero >$state/incoming/deb-3
	printf '{"version":1,"ti' >>$state/events/events.jsonl
	systemctl daemon-reload
	systemctl start --no-block ringwall-agent
	wait_for_agent
	if [ "$(epoch)" = 9 ]; then ok "with an old policy, no anchor and a broken floor on the disk, epoch 9 is enforced"; else bad "epoch $(epoch) is in force"; fi
	refused "an unlisted program" $evil
	works "each is in the status" sh -c 'ringwall status >/run/status; grep -q "an old one back" /run/status && grep -q "trust anchor is damaged" /run/status && grep -q "floor is damaged" /run/status && grep -q "latest time seen" /run/status'
	sleep 4
	works "and an alert" sh -c 'test "$(ringwall events --output json | grep -c state-damaged)" -ge 4'
	refused "an older policy, handed in" ringwall host apply /root/8.policy.json
	sign 10
	works "a newer one makes the floor anew" ringwall host apply /root/10.policy.json
	restart_guest
	;;
5)
	wait_for_agent
	works "nothing is damaged any more" sh -c 'ringwall status >/run/status; ! grep -q "^problem *state" /run/status'
	if [ "$(epoch)" = 10 ]; then ok "it enforces with what a crash left lying about"; else bad "epoch $(epoch) is in force"; fi
	refused "an unlisted program" $evil
	works "the log goes on after half a line" sh -c 'sleep 3; ringwall events -n 5 --output json | tail -n 1 | grep -q "\"path\":\"/root/evil\"\|\"type\""'
	if [ -e $state/incoming/deb-3 ] || [ -e $state/.policy.json.tmp-1 ]; then bad "what the crash left lying about is kept"; else ok "what the crash left lying about is gone"; fi
	ringwall events | grep 'NOTE!\|GAP' | cut -c1-200 | sort | uniq -c | sort -rn | head -n 20
	;;
esac
printf '%d failed\n' $fails
[ $fails = 0 ]
