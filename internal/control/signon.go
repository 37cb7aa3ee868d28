package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/identity"
	"ringwall/internal/resource"
)

// SignOn is the built-in issuer's memory: who proved what, which codes wait to
// be redeemed, which sessions go on. All of it is in the store, so that any
// replica goes on with what another began. Codes and tokens are kept as their
// SHA-256.
type SignOn struct {
	door *Door
	busy chan struct{} // password checks under way: each takes 64 MiB
}

// NewSignOn returns the memory of a built-in issuer.
func NewSignOn(d *Door) *SignOn { return &SignOn{door: d, busy: make(chan struct{}, 2)} }

// Times and bounds of sign-ons.
const (
	DeviceLife  = 10 * time.Minute // for a person to fetch another device
	PollEvery   = 5 * time.Second
	codeLife    = time.Minute
	SessionLife = 12 * time.Hour // from password to password

	triesFor     = 15 * time.Minute
	triesPair    = 10  // wrong passwords of a user from one address
	triesUser    = 100 // of a user from everywhere
	triesAddress = 100 // of everybody from one address
	maxDevices   = 30  // begun from one address in triesFor
	passwordWait = 10 * time.Second
)

// SignOnError is a refusal with its code of RFC 6749, section 5.2, or RFC 8628,
// section 3.5. It is errs.Untrusted.
type SignOnError struct{ Code, Why string }

// Error implements error.
func (e *SignOnError) Error() string { return e.Why }

// Unwrap is the kind of error.
func (e *SignOnError) Unwrap() error { return errs.Untrusted }

func refuse(code, why string) error { return &SignOnError{code, why} }

// ErrTooMany is of somebody who tries too often.
var ErrTooMany = errors.New("too many tries, wait a quarter of an hour")

// Signed is somebody who proved who he is.
type Signed struct {
	User       string `json:"user"`
	Name       string `json:"name"`
	Generation string `json:"gen"`
	At         int64  `json:"at"` // seconds since 1970
	Nonce      string `json:"nonce,omitempty"`
}

// keeper is what SignOn needs of the store beside Tx.
type keeper interface {
	Keep(ctx context.Context, key string, value []byte, until time.Time) error
	Kept(ctx context.Context, key string) ([]byte, error)
	Forget(ctx context.Context, key string) error
}

func keeperOf(tx Tx) (keeper, error) {
	k, ok := tx.(keeper)
	if !ok {
		return nil, fmt.Errorf("this store keeps nothing for a while: %w", errs.Unsupported)
	}
	return k, nil
}

func keep(ctx context.Context, k keeper, key string, v any, until time.Time) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return k.Keep(ctx, key, b, until)
}

// recall reads what keep kept; errs.NotFound if it is over.
func recall(ctx context.Context, k keeper, key string, v any) error {
	b, err := k.Kept(ctx, key)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func (s *SignOn) write(ctx context.Context, fn func(keeper, Tx) error) error {
	return s.door.store.Write(ctx, func(tx Tx) error {
		k, err := keeperOf(tx)
		if err != nil {
			return err
		}
		return fn(k, tx)
	})
}

// secretKey is where the state behind a secret is.
func secretKey(kind, secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return kind + "/" + hex.EncodeToString(sum[:])
}

// tries counts something until a time.
type tries struct {
	N     int   `json:"n"`
	Until int64 `json:"until"`
}

// count adds one try to each counter; ErrTooMany if one is full.
func count(ctx context.Context, k keeper, now time.Time, limits map[string]int) error {
	for key, limit := range limits {
		t := tries{Until: now.Add(triesFor).Unix()}
		if err := recall(ctx, k, key, &t); err != nil && !errors.Is(err, errs.NotFound) {
			return err
		}
		if t.N >= limit {
			return ErrTooMany
		}
		t.N++
		if err := keep(ctx, k, key, t, time.Unix(t.Until, 0)); err != nil {
			return err
		}
	}
	return nil
}

// userID is the document of a user; the zero id for a name that none can have.
func userID(name string) resource.ID {
	if !ValidName(name) {
		return resource.ID{}
	}
	id, _ := resource.ParseID("/providers/" + TypeUser + "/" + name) // well formed
	return id
}

func (s *SignOn) user(ctx context.Context, tx Tx, name string) (*User, error) {
	id := userID(name)
	if id.Key() == "" {
		return nil, fmt.Errorf("user: %w", errs.NotFound)
	}
	d, err := tx.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	var u User
	return &u, properties(d, &u)
}

// errPassword is the one answer to whoever does not prove who he is: it does not
// tell who exists, who is disabled, or what was wrong.
func errPassword() error { return refuse("access_denied", "name or password is wrong") }

// Password checks a password. from is where it comes from, an address: tries are
// counted before they are checked, by user and address, so that nobody guesses
// on, and guessing locks a user out only where the guesses come from, as long as
// there are not very many. Every sign-on, also one that fails, is in the audit log.
func (s *SignOn) Password(ctx context.Context, name, password, from string, now time.Time) (*Signed, error) {
	known := name
	if !ValidName(name) {
		known = "?"
	}
	pair := "tries/pair/" + key(known) + "/" + from
	err := s.write(ctx, func(k keeper, _ Tx) error {
		return count(ctx, k, now, map[string]int{pair: triesPair, "tries/user/" + key(known): triesUser, "tries/from/" + from: triesAddress})
	})
	if err != nil {
		return nil, fmt.Errorf("sign on: %w", err)
	}
	var u *User
	err = s.door.store.Read(ctx, func(tx Tx) (err error) { u, err = s.user(ctx, tx, key(name)); return err })
	if errors.Is(err, errs.NotFound) {
		u, err = &User{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("sign on: %w", err)
	}
	select {
	case s.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(passwordWait): // so that they do not pile up
		return nil, fmt.Errorf("sign on: too many others do at this moment: %w", ErrTooMany)
	}
	right := identity.VerifyPassword(u.Hash, password)
	<-s.busy
	right = right && !u.Disabled
	r := audit.Record{
		Actor: UserID(Local, key(known)), Action: TypeUser + "/signOn/action", Target: userID(key(known)).String(), Outcome: audit.Done, Reason: "signed on from " + from,
	}
	if !right {
		r.Outcome, r.Reason = audit.Refused, "a wrong name or password from "+from
	}
	err = s.write(ctx, func(k keeper, tx Tx) error {
		if right {
			if err := k.Forget(ctx, pair); err != nil {
				return err
			}
		}
		r := r
		return tx.AppendAudit(ctx, &r)
	})
	switch {
	case err != nil: // no record, no sign-on
		return nil, fmt.Errorf("sign on: %w", err)
	case !right:
		return nil, errPassword()
	}
	return &Signed{User: key(name), Name: u.Name, Generation: identity.Generation(u.Hash), At: now.Unix()}, nil
}

// ChangePassword gives a user who knows the old password a new one, which ends
// every session. A new one that is too short is errs.Invalid.
func (s *SignOn) ChangePassword(ctx context.Context, name, old, password, from string, now time.Time) error {
	by, err := s.Password(ctx, name, old, from, now)
	if err != nil {
		return err
	}
	hash, err := identity.HashPassword(password)
	if err != nil {
		return err
	}
	// nobody needs a role for that, and it can do nothing else
	who := Engine("password", TypeUser+"/read", TypeUser+"/write", TypeRoleAssignment+"/write")
	who.Name = UserID(Local, by.User)
	d, err := s.door.Get(ctx, who, userID(by.User))
	if err != nil {
		return err
	}
	var u User
	if err := properties(d, &u); err != nil {
		return err
	}
	u.Hash = hash
	b, err := json.Marshal(u)
	if err != nil {
		return err
	}
	_, err = s.door.Put(ctx, who, resource.Document{ID: d.ID, Location: d.Location, Tags: d.Tags, Properties: b}, resource.When{Revision: d.Revision}, false)
	return err
}

// LocalActor is a user of the built-in issuer whose token is genuine. Who is
// gone, disabled, or has a new password since is errs.Untrusted.
func (s *SignOn) LocalActor(ctx context.Context, name, generation string) (*Actor, error) {
	err := s.door.store.Read(ctx, func(tx Tx) error { return s.goesOn(ctx, tx, name, generation) })
	if err != nil {
		return nil, fmt.Errorf("authenticate: %w", err)
	}
	id := UserID(Local, name)
	return &Actor{ID: id, Name: id}, nil
}

func (s *SignOn) goesOn(ctx context.Context, tx Tx, name, generation string) error {
	u, err := s.user(ctx, tx, name)
	if err != nil && !errors.Is(err, errs.NotFound) {
		return err
	}
	if err != nil || u.Disabled || u.Hash == "" || identity.Generation(u.Hash) != generation {
		return refuse("invalid_grant", "the user is gone or disabled, or has a new password")
	}
	return nil
}

// device is a sign-on that waits for another device.
type device struct {
	UserCode string  `json:"userCode"`
	By       *Signed `json:"by,omitempty"`
	Polled   int64   `json:"polled,omitempty"`
	Until    int64   `json:"until"`
}

// StartDevice begins a sign-on that is finished on another device (RFC 8628).
func (s *SignOn) StartDevice(ctx context.Context, from string, now time.Time) (deviceCode, userCode string, err error) {
	err = s.write(ctx, func(k keeper, _ Tx) error {
		if err := count(ctx, k, now, map[string]int{"devices/" + from: maxDevices}); err != nil {
			return err
		}
		deviceCode, userCode = identity.NewSecret(), identity.NewUserCode()
		var other string
		if err := recall(ctx, k, "usercode/"+userCode, &other); !errors.Is(err, errs.NotFound) {
			return errors.Join(err, ErrTooMany) // as good as impossible
		}
		until := now.Add(DeviceLife)
		at := secretKey("device", deviceCode)
		return errors.Join(
			keep(ctx, k, at, device{UserCode: userCode, Until: until.Unix()}, until),
			keep(ctx, k, "usercode/"+userCode, at, until))
	})
	if err != nil {
		return "", "", fmt.Errorf("begin a sign-on: %w", err)
	}
	return deviceCode, userCode, nil
}

// ApproveDevice lets the device with a user code in as somebody.
func (s *SignOn) ApproveDevice(ctx context.Context, userCode string, by *Signed) error {
	unknown := refuse("invalid_grant", "no sign-on waits for this code; it may be over")
	plain := identity.PlainUserCode(userCode)
	if plain == "" {
		return unknown
	}
	return s.write(ctx, func(k keeper, _ Tx) error {
		var at string
		var d device
		err := recall(ctx, k, "usercode/"+plain, &at)
		if err == nil {
			err = recall(ctx, k, at, &d)
		}
		if errors.Is(err, errs.NotFound) {
			return unknown
		}
		if err != nil {
			return err
		}
		d.By = by
		return errors.Join(k.Forget(ctx, "usercode/"+plain), keep(ctx, k, at, d, time.Unix(d.Until, 0)))
	})
}

// PollDevice asks whether a device was let in.
func (s *SignOn) PollDevice(ctx context.Context, deviceCode string, now time.Time) (*Signed, error) {
	var out *Signed
	var refusal error
	at := secretKey("device", deviceCode)
	err := s.write(ctx, func(k keeper, _ Tx) error {
		out, refusal = nil, nil
		var d device
		err := recall(ctx, k, at, &d)
		if errors.Is(err, errs.NotFound) {
			refusal = refuse("expired_token", "the sign-on is over, or never was")
			return nil
		}
		if err != nil {
			return err
		}
		if d.By != nil {
			out = d.By
			return k.Forget(ctx, at)
		}
		refusal = refuse("authorization_pending", "nobody has entered the code yet")
		if now.Unix()-d.Polled < int64(PollEvery/time.Second)-1 {
			refusal = refuse("slow_down", "ask less often")
		}
		d.Polled = now.Unix()
		return keep(ctx, k, at, d, time.Unix(d.Until, 0))
	})
	if err = errors.Join(err, refusal); err != nil {
		return nil, err
	}
	return out, nil
}

// grant is an authorization code that was given out.
type grant struct {
	By        Signed `json:"by"`
	Redirect  string `json:"redirect"`
	Challenge string `json:"challenge"`
}

// NewCode makes an authorization code for whoever knows the verifier of a PKCE
// challenge.
func (s *SignOn) NewCode(ctx context.Context, by *Signed, redirect, challenge string, now time.Time) (string, error) {
	code := identity.NewSecret()
	err := s.write(ctx, func(k keeper, _ Tx) error {
		return keep(ctx, k, secretKey("code", code), grant{*by, redirect, challenge}, now.Add(codeLife))
	})
	return code, err
}

// Redeem takes an authorization code, once, whether it fits or not.
func (s *SignOn) Redeem(ctx context.Context, code, redirect, verifier string) (*Signed, error) {
	var g grant
	at := secretKey("code", code)
	err := s.write(ctx, func(k keeper, _ Tx) error {
		g = grant{}
		if err := recall(ctx, k, at, &g); err != nil {
			return err
		}
		return k.Forget(ctx, at)
	})
	if err != nil && !errors.Is(err, errs.NotFound) {
		return nil, err
	}
	if err != nil || g.Redirect != redirect || !identity.Answers(g.Challenge, verifier) {
		return nil, refuse("invalid_grant", "the code is over, used, or somebody else's")
	}
	return &g.By, nil
}

// refresh is a refresh token. A family of them begins with a password.
type refresh struct {
	By     Signed `json:"by"`
	Family string `json:"family"`
	Used   bool   `json:"used,omitempty"`
}

// StartSession returns the first refresh token of somebody who proved who he is.
func (s *SignOn) StartSession(ctx context.Context, by *Signed) (string, error) {
	token := identity.NewSecret()
	until := time.Unix(by.At, 0).Add(SessionLife)
	err := s.write(ctx, func(k keeper, _ Tx) error {
		r := refresh{By: *by, Family: secretKey("family", identity.NewSecret())}
		r.By.Nonce = ""
		return errors.Join(keep(ctx, k, r.Family, by.User, until), keep(ctx, k, secretKey("refresh", token), r, until))
	})
	return token, err
}

// Refresh takes a refresh token and gives another. One that comes twice was
// stolen, or its answer was lost: the whole session is over then.
func (s *SignOn) Refresh(ctx context.Context, token string) (*Signed, string, error) {
	var out refresh
	var refusal error
	next := identity.NewSecret()
	at := secretKey("refresh", token)
	err := s.write(ctx, func(k keeper, tx Tx) error {
		out, refusal = refresh{}, refuse("invalid_grant", "the session is over, sign on again")
		var r refresh
		var user string
		err := recall(ctx, k, at, &r)
		if err == nil {
			err = recall(ctx, k, r.Family, &user)
		}
		switch {
		case errors.Is(err, errs.NotFound):
			return nil
		case err != nil:
			return err
		case r.Used:
			return k.Forget(ctx, r.Family)
		}
		if err := s.goesOn(ctx, tx, r.By.User, r.By.Generation); err != nil {
			return err
		}
		until := time.Unix(r.By.At, 0).Add(SessionLife)
		out, refusal = r, nil
		used := r
		used.Used = true
		return errors.Join(keep(ctx, k, at, used, until), keep(ctx, k, secretKey("refresh", next), r, until))
	})
	if err = errors.Join(err, refusal); err != nil {
		return nil, "", err
	}
	return &out.By, next, nil
}

// EndSession ends a session by its refresh token; one that is over is no error.
func (s *SignOn) EndSession(ctx context.Context, token string) error {
	return s.write(ctx, func(k keeper, _ Tx) error {
		var r refresh
		err := recall(ctx, k, secretKey("refresh", token), &r)
		if errors.Is(err, errs.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return k.Forget(ctx, r.Family)
	})
}

// Issuers are the issuers elsewhere that are believed, by the name of their document.
func (s *SignOn) Issuers(ctx context.Context) (map[string]Issuer, error) {
	out := map[string]Issuer{}
	err := s.door.store.Read(ctx, func(tx Tx) error {
		clear(out)
		return each(ctx, tx, kindIssuer, func(d *resource.Document) error {
			var i Issuer
			if err := properties(d, &i); err != nil {
				return err
			}
			if !i.Disabled {
				out[d.ID.Name()] = i
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read the issuers: %w", err)
	}
	return out, nil
}
