// What is shown, in the address: a link shows the same. The fragment belongs to the sign-in.

/** One value of the address; null if it is not there. */
export const fromAddress = (name) => new URLSearchParams(location.search).get(name);

/** Put a value into the address, or take it out if it is null, "" or the default. */
export function toAddress(name, value) {
  const values = new URLSearchParams(location.search);
  if (value === null || value === undefined || value === "") values.delete(name);
  else values.set(name, value);
  const query = values.toString();
  history.replaceState(null, "", `${location.pathname}${query ? `?${query}` : ""}${location.hash}`);
}
