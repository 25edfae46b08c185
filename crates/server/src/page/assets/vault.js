// Images and plans of images: too large for the conversations' own storage. IndexedDB keeps them; where
// the browser has none (private windows of some), they last as long as the page.

const STORE = "things";

/** @type {Map<string, any>} */
const fallback = new Map();

/** @type {Promise<IDBDatabase | null> | undefined} */
let opened;

function open() {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("locket", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE);
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
      request.onblocked = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} work
 * @returns {Promise<T | null>} null without a database, or if it fails
 */
async function inStore(mode, work) {
  const database = await open();
  if (database === null) return null;
  return new Promise((resolve) => {
    try {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => resolve(null);
      transaction.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
}

/**
 * @param {string} id
 * @param {any} thing
 */
export async function keep(id, thing) {
  const kept = await inStore("readwrite", (store) => store.put(thing, id));
  if (kept === null) fallback.set(id, thing);
}

/**
 * @param {string} id
 * @returns {Promise<any>} null if it is gone
 */
export async function find(id) {
  return fallback.get(id) ?? (await inStore("readonly", (store) => store.get(id))) ?? null;
}

/** @param {Iterable<string>} ids */
export async function forget(ids) {
  for (const id of ids) {
    fallback.delete(id);
    await inStore("readwrite", (store) => store.delete(id));
  }
}

/**
 * Forgets what nothing needs: images of messages that were taken back, or of tabs that crashed.
 *
 * @param {() => Set<string>} inUse asked after the list is read, since messages are saved before their images
 */
export async function sweep(inUse) {
  const ids = (await inStore("readonly", (store) => store.getAllKeys())) ?? [];
  const needed = inUse();
  await forget(ids.map(String).filter((id) => !needed.has(id)));
}
