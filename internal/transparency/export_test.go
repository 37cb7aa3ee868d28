package transparency

import "time"

// Hurry makes a client wait less.
func (c *TSAClient) Hurry(wait, timeout time.Duration) {
	c.wait = wait
	c.http.Timeout = timeout
}
