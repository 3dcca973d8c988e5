//! All connections of one device: found by key (for packets), by token (for readiness), and in the order in which
//! they get their turn at the guest's buffers.

use std::collections::{BTreeMap, VecDeque};

use super::connection::{Connection, Phase};
use super::packet::Key;

/// Most connections at a time, those that only wait for their end included.
pub const MAX_CONNECTIONS: usize = 1024;
/// First port that the host dials from.
const FIRST_PORT: u32 = 1 << 20;
/// Not a port (`VMADDR_PORT_ANY`).
const NO_PORT: u32 = u32::MAX;

/// Largest window: what Linux lets itself send ahead by default.
pub const MAX_WINDOW: u32 = 256 << 10;
/// Smallest window.
pub const MIN_WINDOW: u32 = 16 << 10;
/// What all windows may sum up to before new ones get only [`MIN_WINDOW`].
const WINDOW_BUDGET: u64 = 32 << 20;

/// Names a connection as long as it lives, and never another one after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    slot: u32,
    generation: u32,
}

impl Token {
    /// As epoll keeps it.
    pub const fn to_u64(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }

    /// From what epoll gave back.
    #[expect(clippy::cast_possible_truncation, reason = "each half of the 64 bits is taken by itself")]
    pub const fn from_u64(bits: u64) -> Self {
        Token { slot: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// There are [`MAX_CONNECTIONS`] already, all in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX_CONNECTIONS} connections already")]
pub struct Full;

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    scheduled: bool,
    connection: Option<Connection>,
}

/// The connections.
#[derive(Debug)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: BTreeMap<Key, Token>,
    turns: VecDeque<Token>,
    promised: u64,
    next_port: u32,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            turns: VecDeque::new(),
            promised: 0,
            next_port: FIRST_PORT,
        }
    }
}

impl Table {
    /// Connections there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Window for a new connection. The first hundred or so get the largest one; it shrinks as they get more, so
    /// that the memory which a guest can fill stays bounded, whatever the host's ends do.
    pub fn window(&self) -> u32 {
        let share = WINDOW_BUDGET.saturating_sub(self.promised) / 16;
        let share = u32::try_from(share).unwrap_or(MAX_WINDOW);
        (share & !0xfff).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// A key for dialling `guest_port` that no connection has.
    pub fn dial_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port += 1;
            if self.next_port == NO_PORT {
                self.next_port = FIRST_PORT;
            }
            // Ends: there are far fewer connections than ports.
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Whether there is room for one more.
    pub fn has_room(&self) -> bool {
        self.len() < MAX_CONNECTIONS
    }

    /// Some connection that has nothing left but to wait for the guest's last word.
    pub fn some_closing(&self) -> Option<Token> {
        let closing = |t: &&Token| self.get(**t).is_some_and(|c| matches!(c.phase(), Phase::Closing));
        self.by_key.values().find(closing).copied()
    }

    /// Adds a connection, whose key no other one has.
    pub fn insert(&mut self, connection: Connection) -> Result<Token, Full> {
        if !self.has_room() {
            return Err(Full);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("there are at most MAX_CONNECTIONS slots")
        });
        let entry = &mut self.slots[slot as usize];
        let token = Token { slot, generation: entry.generation };
        let other = self.by_key.insert(connection.key, token);
        debug_assert!(other.is_none());
        self.promised += u64::from(connection.window_size());
        entry.connection = Some(connection);
        Ok(token)
    }

    /// The connection that packets with this key are about.
    pub fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    /// The connection, if it lives.
    pub fn get(&self, token: Token) -> Option<&Connection> {
        self.slot(token)?.connection.as_ref()
    }

    /// The connection, if it lives.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(token.slot as usize)?;
        slot.connection.as_mut().filter(|_| slot.generation == token.generation)
    }

    fn slot(&self, token: Token) -> Option<&Slot> {
        self.slots.get(token.slot as usize).filter(|s| s.generation == token.generation)
    }

    /// All connections that are found by key, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &Connection)> {
        self.by_key.values().filter_map(|token| Some((*token, self.get(*token)?)))
    }

    /// Takes the key from a connection which the guest has forgotten. It lives on.
    pub fn forget_key(&mut self, token: Token) {
        if let Some(key) = self.get(token).map(|c| c.key)
            && self.by_key.get(&key) == Some(&token)
        {
            self.by_key.remove(&key);
        }
    }

    /// Removes a connection.
    pub fn remove(&mut self, token: Token) -> Option<Connection> {
        self.forget_key(token);
        self.slot(token)?;
        let slot = &mut self.slots[token.slot as usize];
        let connection = slot.connection.take()?;
        if std::mem::take(&mut slot.scheduled) {
            // Else a guest that opens and closes and gives us no buffers could make the list grow for ever.
            self.turns.retain(|t| *t != token);
        }
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(token.slot);
        self.promised -= u64::from(connection.window_size());
        Some(connection)
    }

    /// Removes all connections.
    pub fn clear(&mut self) -> Vec<Connection> {
        self.by_key.clear();
        let tokens: Vec<Token> = (0..)
            .zip(&self.slots)
            .map(|(slot, entry): (u32, &Slot)| Token { slot, generation: entry.generation })
            .collect();
        tokens.into_iter().filter_map(|token| self.remove(token)).collect()
    }

    /// The connection has something for the guest: it gets a turn after those which have one coming.
    pub fn schedule(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(token.slot as usize)
            && slot.generation == token.generation
            && slot.connection.is_some()
            && !std::mem::replace(&mut slot.scheduled, true)
        {
            self.turns.push_back(token);
        }
    }

    /// The connection whose turn it is. Its turn is over with that, unless it is scheduled again.
    pub fn next_turn(&mut self) -> Option<Token> {
        let token = self.turns.pop_front()?;
        self.slots[token.slot as usize].scheduled = false;
        Some(token)
    }

    /// It could not be served: it stays the next one.
    pub fn keep_turn(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(token.slot as usize)
            && slot.connection.is_some()
            && !std::mem::replace(&mut slot.scheduled, true)
        {
            self.turns.push_front(token);
        }
    }
}
