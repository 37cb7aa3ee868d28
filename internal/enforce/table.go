package enforce

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// slack is how many entries a table can take on top of a compiled policy:
// packages authorised between two policies.
const slack = 1 << 15

// slots is INTERPRETERS of bpf/ringwall.h.
const slots = 64

// batch is how many entries go to the kernel in one call.
const batch = 4096

// Apply puts a table in force. The switch is one 32-bit store in the kernel: a
// check sees the old policy or the new one, never a mixture, and an error
// leaves the old one in force.
func (e *Engine) Apply(t *integrity.Table) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := (e.active + 1) & 1
	slotOf, err := e.writeInterpreters(next, t.Interpreters)
	if err != nil {
		return err
	}
	table, err := e.newTable(t, slotOf)
	if err != nil {
		return err
	}
	if err := e.install(next, t, table); err != nil {
		table.Close()
		return err
	}
	if e.table != nil {
		e.disown(e.table)
		e.table.Close()
	}
	e.table, e.active = table, next
	return nil
}

func (e *Engine) install(next uint32, t *integrity.Table, table *ebpf.Map) error {
	if err := e.own(table); err != nil {
		return fmt.Errorf("guard the new table: %w", err)
	}
	if err := e.objs.Tables.Put(next, table); err != nil {
		return fmt.Errorf("install the new table: %w", err)
	}
	g := engineGeneration{
		Epoch: t.Epoch, Memory: uint8(t.Process.Memory), Ptrace: uint8(t.Process.Ptrace),
		BlockWrites: uint8(t.Process.BlockWrites), CodeWrites: uint8(t.Process.CodeWrites),
		Index: next, AppliedUs: uint64(time.Now().UnixMicro()), Entries: uint64(len(t.Entries)), Policy: t.PolicyDigest,
	}
	for k, m := range t.Modes {
		g.Modes[k] = uint8(m)
	}
	for _, v := range t.Entries {
		if v.Kinds == 0 {
			g.Bans = 1
			break
		}
	}
	if err := e.objs.Settings.Put(next, g); err != nil {
		return fmt.Errorf("write the settings: %w", err)
	}
	return e.change(func(st *engineSteering) { st.Active = next })
}

func (e *Engine) disown(m *ebpf.Map) {
	if info, err := m.Info(); err == nil {
		if id, ok := info.ID(); ok {
			// a stale id only guards a map that is gone
			_ = e.objs.OwnMaps.Delete(uint32(id))
		}
	}
}

func (e *Engine) newTable(t *integrity.Table, slotOf []uint8) (*ebpf.Map, error) {
	spec := e.shape.Copy() // with its type information: older kernels compare that too
	spec.Name = "rw_table"
	spec.MaxEntries = uint32(len(t.Entries) + slack)
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("make a table of %d entries: %w", len(t.Entries), err)
	}
	if err := fill(m, maps.All(t.Entries), slotOf); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func fill(m *ebpf.Map, entries func(func(integrity.Key, integrity.Entry) bool), slotOf []uint8) error {
	keys := make([]engineKey, 0, batch)
	values := make([]engineEntry, 0, batch)
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		if _, err := m.BatchUpdate(keys, values, nil); err != nil {
			return fmt.Errorf("fill the table: %w", err)
		}
		keys, values = keys[:0], values[:0]
		return nil
	}
	for k, v := range entries {
		value := engineEntry{Kinds: uint16(v.Kinds), Roles: uint16(v.Roles)}
		if v.Interpreter != 0 {
			if int(v.Interpreter) > len(slotOf) {
				return fmt.Errorf("entry %s names interpreter %d of %d: %w", k.Digest, v.Interpreter, len(slotOf), errs.Invalid)
			}
			value.Interpreter = slotOf[v.Interpreter-1]
		}
		keys = append(keys, engineKey{Space: uint32(k.Space), Digest: k.Digest})
		values = append(values, value)
		if len(keys) == batch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// Add authorises more content under the policy in force, until the next Apply:
// a package that is about to be unpacked. Entries take effect one by one.
func (e *Engine) Add(entries map[integrity.Key]integrity.Entry) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.table == nil {
		return fmt.Errorf("add %d entries: no policy is in force: %w", len(entries), errs.Conflict)
	}
	for _, k := range slices.Collect(maps.Keys(entries)) {
		v := entries[k]
		if v.Interpreter != 0 {
			return fmt.Errorf("add %s: an interpreter needs a policy of its own: %w", k.Digest, errs.Invalid)
		}
		// never touch what the policy itself says of this content
		err := e.table.Update(engineKey{Space: uint32(k.Space), Digest: k.Digest}, engineEntry{Kinds: uint16(v.Kinds), Roles: uint16(v.Roles)}, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("add %s: %w", k.Digest, err)
		}
	}
	return nil
}

// Lookup reads an entry of the live table; errs.NotFound if there is none.
func (e *Engine) Lookup(k integrity.Key) (integrity.Entry, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var v engineEntry
	if e.table == nil {
		return integrity.Entry{}, fmt.Errorf("look up %s: no policy is in force: %w", k.Digest, errs.NotFound)
	}
	if err := e.table.Lookup(engineKey{Space: uint32(k.Space), Digest: k.Digest}, &v); err != nil {
		return integrity.Entry{}, fmt.Errorf("look up %s: %w", k.Digest, errs.NotFound)
	}
	return integrity.Entry{Kinds: integrity.KindSet(v.Kinds), Roles: integrity.Role(v.Roles), Interpreter: v.Interpreter}, nil
}

// writeInterpreters puts the rules into generation g and returns each one's
// slot. A name keeps its slot across policies, because running processes carry
// the number.
func (e *Engine) writeInterpreters(g uint32, rules []integrity.Interpreter) ([]uint8, error) {
	taken := map[string]uint8{}
	used := [slots]bool{0: true}
	for s := uint32(1); s < slots; s++ {
		var old engineInterpreter
		if err := e.objs.Interpreters.Lookup((g^1)*slots+s, &old); err != nil {
			return nil, fmt.Errorf("read interpreter %d: %w", s, err)
		}
		if name := text(old.Name[:]); name != "" {
			taken[name], used[s] = uint8(s), true
		}
	}
	slotOf := make([]uint8, len(rules))
	next := make([]engineInterpreter, slots)
	for i, r := range rules {
		name := r.Name[:min(len(r.Name), 15)]
		s, ok := taken[name]
		if !ok {
			free := slices.Index(used[:], false)
			if free < 0 {
				return nil, fmt.Errorf("%d interpreters, at most %d: %w", len(rules), integrity.MaxInterpreters, errs.Invalid)
			}
			s = uint8(free)
			used[s], taken[name] = true, s
		}
		rule, err := encodeInterpreter(name, r)
		if err != nil {
			return nil, err
		}
		slotOf[i], next[s] = s, rule
	}
	for s := uint32(1); s < slots; s++ {
		if err := e.objs.Interpreters.Put(g*slots+s, next[s]); err != nil {
			return nil, fmt.Errorf("write interpreter %d: %w", s, err)
		}
	}
	return slotOf, e.writeDataPaths(g, rules, slotOf)
}

func (e *Engine) writeDataPaths(g uint32, rules []integrity.Interpreter, slotOf []uint8) error {
	var stale []engineDataPath
	var k engineDataPath
	var v uint8
	for it := e.objs.DataPaths.Iterate(); it.Next(&k, &v); {
		if uint32(k.Generation) == g {
			stale = append(stale, k)
		}
	}
	for i := range stale {
		if err := e.objs.DataPaths.Delete(stale[i]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("clear data paths: %w", err)
		}
	}
	for i, r := range rules {
		for _, path := range r.DataPaths {
			k := engineDataPath{Generation: uint8(g), Interpreter: slotOf[i]}
			if len(path) > len(k.Path)-1 {
				return fmt.Errorf("interpreter %s: data path %q is longer than %d bytes: %w", r.Name, path, len(k.Path)-1, errs.Invalid)
			}
			for j := range path {
				k.Path[j] = int8(path[j])
			}
			if err := e.objs.DataPaths.Put(k, uint8(1)); err != nil {
				return fmt.Errorf("interpreter %s: data path %q: %w", r.Name, path, err)
			}
		}
	}
	return nil
}

func encodeInterpreter(name string, r integrity.Interpreter) (engineInterpreter, error) {
	out := engineInterpreter{Reads: uint8(r.Reads), InlineMode: uint8(r.Inline), StdinForms: uint8(r.Stdin), Word: uint8(r.Word)}
	// "-oc option code" is code in a shell and nowhere else
	if strings.Contains(r.StdinFlags, "s") && strings.Contains(r.ArgFlags, "o") {
		out.Shell = 1
	}
	for i := range name {
		out.Name[i] = int8(name[i])
	}
	for set, letters := range map[*[2]uint64]string{&out.InlineFlags: r.InlineFlags, &out.ArgFlags: r.ArgFlags, &out.StdinFlags: r.StdinFlags, &out.ScriptFlags: r.ScriptFlags} {
		for _, c := range []byte(letters) {
			if c >= 128 {
				return out, fmt.Errorf("interpreter %s: option letter %q is not ASCII: %w", r.Name, c, errs.Invalid)
			}
			set[c/64] |= 1 << (c % 64)
		}
	}
	if len(r.InlineLong) > len(out.InlineLong) || len(r.ArgLong) > len(out.ArgLong) || len(r.Environment) > len(out.Environment) || len(r.CodeSuffix) > len(out.Suffixes) {
		return out, fmt.Errorf("interpreter %s: at most %d long options or variables of a sort and %d suffixes: %w", r.Name, len(out.InlineLong), len(out.Suffixes), errs.Invalid)
	}
	for i, o := range r.InlineLong {
		if err := encodeOption(o, &out.InlineLong[i].Word, &out.InlineLong[i].Mask, &out.InlineLong[i].Len); err != nil {
			return out, fmt.Errorf("interpreter %s: %w", r.Name, err)
		}
	}
	for i, o := range r.ArgLong {
		if err := encodeOption(o, &out.ArgLong[i].Word, &out.ArgLong[i].Mask, &out.ArgLong[i].Len); err != nil {
			return out, fmt.Errorf("interpreter %s: %w", r.Name, err)
		}
	}
	for i, v := range r.Environment {
		text, any := strings.CutSuffix(v, "*")
		if !any {
			text += "="
		}
		if err := encodeOption(text, &out.Environment[i].Word, &out.Environment[i].Mask, &out.Environment[i].Len); err != nil {
			return out, fmt.Errorf("interpreter %s: variable: %w", r.Name, err)
		}
	}
	out.N_environment = uint8(len(r.Environment))
	out.N_inlineLong, out.N_argLong, out.N_suffixes = uint8(len(r.InlineLong)), uint8(len(r.ArgLong)), uint8(len(r.CodeSuffix))
	for i, s := range r.CodeSuffix {
		if s == "" || len(s) > 7 {
			return out, fmt.Errorf("interpreter %s: suffix %q must have 1 to 7 bytes: %w", r.Name, s, errs.Invalid)
		}
		out.Suffixes[i].Len = uint32(len(s))
		for j := range len(s) {
			out.Suffixes[i].Word |= uint64(s[j]) << (8 * j)
		}
		if slices.Contains(r.Bytecode, s) {
			out.Suffixes[i].Bytecode = 1
		}
	}
	return out, nil
}

func encodeOption(o string, word, mask *[2]uint64, length *uint32) error {
	if o == "" {
		return fmt.Errorf("empty option: %w", errs.Invalid)
	}
	o = o[:min(len(o), 16)] // no more is compared
	for j := range len(o) {
		word[j/8] |= uint64(o[j]) << (8 * (j % 8))
		mask[j/8] |= 0xff << (8 * (j % 8))
	}
	*length = uint32(len(o))
	return nil
}
