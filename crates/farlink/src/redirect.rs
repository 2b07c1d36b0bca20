//! Symbols whose definition can be replaced while linked code uses them.
//!
//! Such a symbol is a stub for everybody: a jump through a pointer in linked data. Objects that define the name are
//! versions: each is known by a name of its own, and the pointer leads to one of them. The controller has the pointer
//! mapped, so switching it is writing a word.

use crate::Error;
use crate::library::{Library, LibraryInner, Object, ObjectId};
use crate::session::SessionInner;
use crate::state::{ObjectState, State};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, MemProt};
use farlink_graph::LinkGraph;
use farlink_mem::{FinalizedAlloc, SegmentLayout};
use farlink_wire::functions::CALL_NATIVE;
use farlink_wire::native::{Arguments, NativeCall, RegisterClass, ResultShape};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The stub, what it leads to when there is no version, and a function that sets the pointer where the controller cannot.
///
/// ```text
/// jmp *pointer(%rip)                 the displacement is at 2
/// ud2                                at 8
/// mov %rsi, (%rdi); ret              at 12
/// ```
const STUB: [u8; 16] = [0xff, 0x25, 0, 0, 0, 0, 0xcc, 0xcc, 0x0f, 0x0b, 0xcc, 0xcc, 0x48, 0x89, 0x37, 0xc3];
const DISPLACEMENT: std::ops::Range<usize> = 2..6;
const TRAP_OFFSET: u64 = 8;
const SETTER_OFFSET: u64 = 12;

/// Bytes of the pointer.
const POINTER_BYTES: u64 = 8;

/// The redirectable symbols of a library, and the objects that they lead to.
#[derive(Default)]
pub(crate) struct Redirects(HashMap<Box<str>, Lead>);

struct Lead {
    cell: Arc<Cell>,
    object: Option<ObjectId>,
}

/// Returns the name of a version: that of its symbol, and the number of its object.
fn version_name(name: &str, serial: u64) -> String {
    format!("{name}#{serial}")
}

impl Redirects {
    /// Gives the definitions of redirectable symbols in a graph names of their own.
    pub(crate) fn rename_versions(&self, graph: &mut LinkGraph, serial: u64) {
        if self.0.is_empty() {
            return;
        }
        let versions: Vec<_> = graph.definitions().filter(|&id| self.0.contains_key(graph.symbol_name(id))).collect();
        if versions.is_empty() {
            return;
        }
        for id in versions {
            let name = version_name(graph.symbol_name(id), serial);
            graph.rename(id, &name);
        }
        // The object's bytes do not have these names.
        graph.keep_pristine();
    }

    /// Returns the symbols that lead to an object.
    pub(crate) fn leading_to(&self, object: ObjectId) -> Vec<String> {
        let leading = self.0.iter().filter(|(_, lead)| lead.object == Some(object));
        leading.map(|(name, _)| format!("the redirectable symbol {name}")).collect()
    }
}

/// A stub and its pointer.
struct Cell {
    stub: ExecutorAddr,
    pointer: ExecutorAddr,
    /// None only while it is dropped.
    memory: Option<FinalizedAlloc>,
    session: Arc<SessionInner>,
    /// Held while the pointer is switched.
    switching: Mutex<()>,
}

impl Cell {
    /// Makes a stub that leads to what traps.
    fn new(session: &Arc<SessionInner>) -> Result<Self, Error> {
        let segment = |prot, content_bytes| SegmentLayout {
            group: AllocGroup::standard(prot),
            content_bytes,
            zero_fill_bytes: 0,
            align: Align::new(16).expect("16 is a power of two"),
        };
        let layouts = vec![segment(MemProt::RX, STUB.len() as u64), segment(session.pointer_prot(), POINTER_BYTES)];
        let alloc = session.memory.allocate(layouts).wait()?;
        let [code, data] = alloc.segments() else { unreachable!("there are as many segments as were asked for") };
        let (stub, pointer) = (code.range.start(), data.range.start());
        let mut bytes = STUB;
        let after = stub.as_u64().wrapping_add(DISPLACEMENT.end as u64);
        // Everything in one reservation is within reach.
        let distance = pointer.as_u64().wrapping_sub(after) as u32;
        bytes[DISPLACEMENT].copy_from_slice(&distance.to_le_bytes());
        code.working.write(0, &bytes)?;
        data.working.write(0, &(stub.as_u64() + TRAP_OFFSET).to_le_bytes())?;
        let memory = session.memory.finalize(vec![(alloc, Vec::new())]).wait()?.into_iter().next();
        Ok(Self { stub, pointer, memory, session: Arc::clone(session), switching: Mutex::new(()) })
    }

    /// Returns what the stub leads to when there is no version.
    fn trap(&self) -> ExecutorAddr {
        ExecutorAddr::new(self.stub.as_u64() + TRAP_OFFSET)
    }

    /// Has the stub lead to `target`. Linked code sees the pointer as it was or as it is now.
    fn set(&self, target: ExecutorAddr) -> Result<(), Error> {
        let range = farlink_addr::ExecutorAddrRange::from_len(self.pointer, POINTER_BYTES);
        let range = range.expect("the pointer is in memory");
        if let Some(view) = self.session.memory.view(range) {
            return Ok(view.write_volatile(0, &target.as_u64().to_le_bytes())?);
        }
        let mut arguments = Arguments::default();
        for word in [self.pointer, target] {
            arguments.push([word.as_u64(), 0], RegisterClass::Int, None);
        }
        let setter = ExecutorAddr::new(self.stub.as_u64() + SETTER_OFFSET);
        let call = NativeCall { function: setter, result: ResultShape::Void, arguments };
        self.session.runtime()?.executor().bind(CALL_NATIVE)?.call(&call).wait()?;
        Ok(())
    }
}

impl SessionInner {
    /// Returns the protection of memory that only the controller writes: where executors copy the data that they write, it is
    /// read-only data to them.
    fn pointer_prot(&self) -> MemProt {
        if self.pool().is_some() { MemProt::READ } else { MemProt::RW }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // If the executor has ended, so has its memory.
        let _ = self.session.memory.deallocate(self.memory.take().into_iter().collect()).wait();
    }
}

/// A symbol whose definition can be replaced: see [`Library::define_redirectable`]. Cheap to clone.
#[derive(Clone)]
pub struct Redirect {
    library: Library,
    name: Arc<str>,
    cell: Arc<Cell>,
}

impl Library {
    /// Defines `name` as a stub, through which linked code reaches whatever definition of it is in use: a jump through a
    /// pointer, which [`Self::redirect`] switches.
    ///
    /// From now on, what objects that are added define under this name is a version of it. They do not contradict each
    /// other. Before one is in use, calling the function ends the executor by an illegal instruction. Calls within a version
    /// may stay in it. Data cannot be replaced like this.
    ///
    /// # Errors
    ///
    /// Fails if the library defines the name already, or the executor has no memory.
    pub fn define_redirectable(&self, name: &str) -> Result<Redirect, Error> {
        let inner = self.inner();
        inner.session.runtime()?;
        let cell = Arc::new(Cell::new(&inner.session).map_err(|error| inner.session.explain(error))?);
        self.define(name, cell.stub)?;
        let lead = Lead { cell: Arc::clone(&cell), object: None };
        inner.lock().redirects.0.insert(name.into(), lead);
        Ok(Redirect { library: self.clone(), name: name.into(), cell })
    }

    /// Links `object` and has every redirectable symbol that it defines lead to it, from one call of linked code to the next.
    /// Calls that are running stay where they are: what was in use before can be removed when they have returned, as
    /// [`Self::retire`] does it.
    ///
    /// # Errors
    ///
    /// Fails, and switches nothing, if the object defines no redirectable symbol ([`Error::NotRedirectable`]), or cannot be
    /// linked.
    pub fn redirect(&self, object: Object) -> Result<(), Error> {
        self.redirect_all(object).map(drop)
    }

    /// As [`Self::redirect`]; gives where `name` leads now.
    pub(crate) fn redirect_one(&self, name: &str, object: Object) -> Result<ExecutorAddr, Error> {
        let leads = self.redirect_all(object)?;
        leads.into_iter().find(|(led, _)| led == name).map(|(_, addr)| addr).ok_or(Error::NotRedirectable)
    }

    fn redirect_all(&self, object: Object) -> Result<Vec<(String, ExecutorAddr)>, Error> {
        let inner = self.inner();
        let (names, versions) = inner.lock().versions(object)?;
        let versions: Vec<&str> = versions.iter().map(String::as_str).collect();
        let leads: Vec<_> = names.into_iter().zip(self.lookup_all(&versions)?).collect();
        for (name, addr) in &leads {
            inner.lead(name, *addr, Some(object.id())).map_err(|error| inner.session.explain(error))?;
        }
        Ok(leads)
    }

    /// Removes an object as soon as no call of a [`Function`](crate::Function) that is running now is running any more.
    ///
    /// That is right for what nothing leads to any more, as after [`Self::redirect`]. Threads that linked code has made, and
    /// pointers to functions that it has kept, are its own business. A call whose result nobody has waited for, or not long
    /// enough, counts as running as long as the session is there.
    ///
    /// # Errors
    ///
    /// Fails, and changes nothing, if other objects refer to it or redirectable symbols lead to it.
    pub fn retire(&self, object: Object) -> Result<(), Error> {
        drop(self.check_unused(object)?);
        self.inner().session.flights.retire(self.inner(), object);
        Ok(())
    }

    /// Waits until `object` is not being linked; fails if it has gone, or something leads to it.
    pub(crate) fn check_unused(&self, object: Object) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.inner().wait_settled(&[object.id()]);
        let slot = state.objects.get(object.id().0 as usize);
        let slot = slot.filter(|slot| slot.serial == object.serial() && !matches!(slot.state, ObjectState::Removed));
        let slot = slot.ok_or(Error::Removed)?;
        let users = slot.users().map(|user| state.name_of(Some(user)));
        let users: Vec<_> = users.chain(state.redirects.leading_to(object.id())).collect();
        if users.is_empty() {
            return Ok(state);
        }
        Err(Error::InUse { object: slot.name.to_string(), users })
    }
}

impl State {
    /// Returns the redirectable symbols that an object defines, and the names of its versions.
    fn versions(&self, object: Object) -> Result<(Vec<String>, Vec<String>), Error> {
        let is_defined = |(_, version): &(String, String)| {
            self.table.winner(version).is_some_and(|definition| definition.object == Some(object.id()))
        };
        let versions = self.redirects.0.keys().map(|name| (name.to_string(), version_name(name, object.serial())));
        let (names, versions): (Vec<_>, Vec<_>) = versions.filter(is_defined).unzip();
        if names.is_empty() { Err(Error::NotRedirectable) } else { Ok((names, versions)) }
    }
}

impl LibraryInner {
    /// Has a redirectable symbol lead to `addr`, in an object of the library or elsewhere.
    fn lead(&self, name: &str, addr: ExecutorAddr, object: Option<ObjectId>) -> Result<(), Error> {
        let cell = self.lock().redirects.0.get(name).map(|lead| Arc::clone(&lead.cell));
        let cell = cell.ok_or(Error::NotRedirectable)?;
        let _switching = cell.switching.lock().unwrap_or_else(PoisonError::into_inner);
        cell.set(addr)?;
        if let Some(lead) = self.lock().redirects.0.get_mut(name) {
            lead.object = object;
        }
        Ok(())
    }
}

impl Redirect {
    /// Returns the symbol's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the symbol's address: that of the stub.
    #[must_use]
    pub fn addr(&self) -> ExecutorAddr {
        self.cell.stub
    }

    /// Has the symbol lead to a function at `target`, wherever that is from.
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot be reached.
    pub fn set(&self, target: ExecutorAddr) -> Result<(), Error> {
        let inner = self.library.inner();
        inner.lead(&self.name, target, None).map_err(|error| inner.session.explain(error))
    }

    /// Has the symbol lead nowhere, as before there was a version of it.
    ///
    /// # Errors
    ///
    /// As [`Self::set`].
    pub fn clear(&self) -> Result<(), Error> {
        self.set(self.cell.trap())
    }
}
