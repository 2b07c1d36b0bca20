//! Adding to a library: objects, graphs and archives.

use crate::Error;
use crate::library::{Library, Object};
use crate::parallel;
use crate::state::{LibraryArchive, State};
use farlink_elf::{Archive, InputKind};
use farlink_graph::{Bytes, LinkGraph};
use std::collections::HashSet;
use std::time::{Duration, Instant};

fn declare(state: &mut State, graph: LinkGraph) -> Result<Object, Error> {
    let id = state.declare(graph)?;
    Ok(Object::new(id, state.object(id).serial))
}

/// Objects that have been read, for [`Library::add_parsed`]. Reading wants no session.
#[derive(Debug)]
pub struct ParsedObjects {
    graphs: Vec<LinkGraph>,
    /// What reading took.
    time: Duration,
}

impl ParsedObjects {
    /// Reads objects, each with the name that errors call it: those of several MiB by as many threads as there are processors.
    ///
    /// # Errors
    ///
    /// Fails if the bytes of one of them are not an object that can be linked.
    pub fn parse<N: AsRef<str> + Sync, B: Into<Bytes>>(
        objects: impl IntoIterator<Item = (N, B)>,
    ) -> Result<Self, Error> {
        Self::parse_by(objects, |name, bytes| Ok(farlink_elf::parse_object(name, bytes)?))
    }

    fn parse_by<N: AsRef<str> + Sync, B: Into<Bytes>>(
        objects: impl IntoIterator<Item = (N, B)>,
        parse: impl Fn(&str, Bytes) -> Result<LinkGraph, Error> + Sync,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        let objects: Vec<(N, Bytes)> = objects.into_iter().map(|(name, bytes)| (name, bytes.into())).collect();
        let bytes = objects.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let parse = |number: usize| {
            let (name, bytes) = &objects[number];
            parse(name.as_ref(), bytes.clone())
        };
        let (graphs, error) = parallel::map(objects.len(), parallel::threads_for(bytes), parse);
        error.map_or(Ok(Self { graphs, time: start.elapsed() }), Err)
    }
}

impl Library {
    /// Declares a relocatable object. `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not an object that can be linked, or if it defines a symbol that another object of the
    /// library defines too, unless one of the definitions is weak.
    pub fn add_object(&self, name: &str, bytes: impl Into<Bytes>) -> Result<Object, Error> {
        let trace = &self.inner().session.trace;
        let (start, traced) = (Instant::now(), trace.now());
        let graph = farlink_elf::parse_object(name, bytes.into())?;
        trace.object("parse", name, traced);
        let mut state = self.inner().lock();
        let object = declare(&mut state, graph)?;
        state.times.parse += start.elapsed();
        Ok(object)
    }

    /// As [`Self::add_object`], for several objects, each with its name: those of several MiB are read by as many threads as
    /// there are processors.
    ///
    /// # Errors
    ///
    /// As [`Self::add_object`], if one of them is refused; then none of them is declared.
    pub fn add_objects<N: AsRef<str> + Sync, B: Into<Bytes>>(
        &self,
        objects: impl IntoIterator<Item = (N, B)>,
    ) -> Result<Vec<Object>, Error> {
        let trace = &self.inner().session.trace;
        let parsed = ParsedObjects::parse_by(objects, |name, bytes| {
            let traced = trace.now();
            let graph = farlink_elf::parse_object(name, bytes)?;
            trace.object("parse", name, traced);
            Ok(graph)
        });
        self.add_parsed(parsed?)
    }

    /// Declares objects that have been read before, maybe while the executor was starting: see
    /// [`SessionBuilder::spawn_while`](crate::SessionBuilder::spawn_while).
    ///
    /// # Errors
    ///
    /// As [`Self::add_objects`].
    pub fn add_parsed(&self, objects: ParsedObjects) -> Result<Vec<Object>, Error> {
        let start = Instant::now();
        let mut state = self.inner().lock();
        let mut declared = Vec::with_capacity(objects.graphs.len());
        for graph in objects.graphs {
            match declare(&mut state, graph) {
                Ok(object) => declared.push(object),
                Err(error) => {
                    declared.into_iter().rev().for_each(|object| drop(state.remove(object.id())));
                    return Err(error);
                }
            }
        }
        state.times.parse += objects.time + start.elapsed();
        Ok(declared)
    }

    /// Declares a graph that has not been read from an object: one that a compiler has built without writing a file.
    ///
    /// # Errors
    ///
    /// Fails if it defines a symbol that another object of the library defines too, unless one of the definitions is weak.
    pub fn add_graph(&self, mut graph: LinkGraph) -> Result<Object, Error> {
        graph.keep_pristine();
        declare(&mut self.inner().lock(), graph)
    }

    /// Adds an archive, whose members are declared when something refers to what they define.
    ///
    /// `name` is what errors call it. Members of a thin archive are files beside it: for one, `name` has to be its
    /// path.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not an archive.
    pub fn add_archive(&self, name: &str, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let start = Instant::now();
        let archive = Archive::parse(name, bytes.into())?;
        let mut state = self.inner().lock();
        state.archives.push(LibraryArchive { archive, loaded: HashSet::new() });
        state.times.parse += start.elapsed();
        Ok(())
    }

    /// Declares all objects of an archive, whether anything refers to them or not.
    ///
    /// `name` is as for [`Self::add_archive`].
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not an archive, or as [`Self::add_object`] does for one of its members; then those before it
    /// are declared.
    pub fn add_whole_archive(&self, name: &str, bytes: impl Into<Bytes>) -> Result<(), Error> {
        let (start, bytes) = (Instant::now(), bytes.into());
        let threads = parallel::threads_for(bytes.len() as u64);
        let archive = Archive::parse(name, bytes)?;
        let members: Vec<_> = archive.members().collect();
        let parse = |number: usize| {
            let (trace, traced) = (&self.inner().session.trace, self.inner().session.trace.now());
            let (name, bytes) = archive.member(members[number])?;
            if farlink_elf::identify(&bytes) != InputKind::Relocatable {
                return Ok(None);
            }
            let graph = farlink_elf::parse_object(&name, bytes)?;
            trace.object("parse", &name, traced);
            Ok(Some(graph))
        };
        let (graphs, error) = parallel::map(members.len(), threads, parse);
        let mut state = self.inner().lock();
        graphs.into_iter().flatten().try_for_each(|graph| state.declare(graph).map(drop))?;
        state.times.parse += start.elapsed();
        error.map_or(Ok(()), Err)
    }
}
